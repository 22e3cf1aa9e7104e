"""Run the quickstart recipe twice: what it gains, what it costs, and whether it repeats.

`python benchmarks/quickstart.py [--out FILE]`
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from machine import machine
from safetensors.torch import load_file
from torch import equal

from sft.recipe.load import load_recipe
from sft.run.job import RunResult, train_from_recipe

RECIPE = Path(__file__).parent.parent / "recipes/quickstart.yaml"


def run(folder: Path) -> RunResult:
    """Run the shipped recipe into a folder."""
    return train_from_recipe(load_recipe(str(RECIPE), [f"training.output_dir={folder}"]))


def repeated(first: RunResult, second: RunResult) -> bool:
    """Tell whether two runs gave the same metrics and the same adapter, bit for bit."""
    a, b = (
        load_file(result.output_dir / "adapter/adapter_model.safetensors")
        for result in (first, second)
    )
    return first.after == second.after and all(equal(a[name], b[name]) for name in a | b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(__file__).parent / "results/quickstart.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        first, second = run(Path(scratch) / "first"), run(Path(scratch) / "second")
        exactly = repeated(first, second)
    result = {"machine": machine(), "repeated_exactly": exactly} | dataclasses.asdict(first)
    result.pop("output_dir")
    args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"repeated exactly: {exactly}; written to {args.out}")


if __name__ == "__main__":
    main()
