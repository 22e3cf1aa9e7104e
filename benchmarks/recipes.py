"""Run every shipped recipe but the quickstart once, whole: what it gains, trains and costs.

`python benchmarks/recipes.py [--only NAME ...] [--out FILE]`
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

from sft.recipe.load import load_recipe
from sft.run.job import train_from_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
KEPT = (
    "before", "after", "trained_weights", "all_weights", "steps", "train_loss",
    "max_logit_difference", "seconds",
)  # fmt: skip


def run(path: Path) -> dict[str, Any]:
    """Run one recipe into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(str(path), [f"training.output_dir={scratch}/run"])
        found = dataclasses.asdict(train_from_recipe(recipe))
    return {"method": recipe.method["name"]} | {key: found[key] for key in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(__file__).parent / "results/recipes.json"
    parser.add_argument("--only", nargs="*", help="names of recipes; their results are renewed")
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    names = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "quickstart")
    kept = json.loads(args.out.read_text())["recipes"] if args.only and args.out.is_file() else {}
    for name in args.only or names:
        kept[name] = run(RECIPES / f"{name}.yaml")
        result = {"machine": machine(), "recipes": dict(sorted(kept.items()))}
        args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
