"""Run recipes at several learning rates: what each learns, and what it forgets of general text.

`python benchmarks/rates.py [--only CASE ...] [--jobs N] [--out FILE]`
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from machine import machine

from sft.recipe.load import load_recipe
from sft.run.job import train_from_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
ALWAYS = (  # all take the same steps and words; what is measured needs no export
    "training.max_steps=80", "evaluation.num_examples=100", "export.merged=false",
    "export.verify=false",
)  # fmt: skip
KEPT = (
    "before", "after", "forgetting", "trained_weights", "all_weights", "steps", "train_loss",
)  # fmt: skip
EVERYWHERE = ("method.target_modules=all-linear", "method.density=0.01")
# case: its recipe, what it changes there, the rates
CASES: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "SpIEL of o and down, begun by gradients": ("quickstart", (), (7.5e-4, 1.5e-3, 3e-3)),
    "SpIEL of all linear layers, begun by gradients": ("quickstart", EVERYWHERE, (1e-3,)),
    "SpIEL of all linear layers, begun at random": (
        "quickstart", (*EVERYWHERE, "method.selection=random"), (5e-4, 1e-3, 2.5e-3, 5e-3),
    ),
    "S2FT": ("s2ft", (), (2.5e-3, 5e-3, 1e-2, 2e-2)),
    "SoRA": ("sora", (), (1e-3, 3e-3, 1e-2)),
    "SLTrain": ("sltrain", (), (1e-3, 3e-3, 1e-2)),
}  # fmt: skip


def run(case: str, rate: float) -> dict[str, Any]:
    """Run one case at one rate into a folder that is thrown away."""
    name, changes, _ = CASES[case]
    with tempfile.TemporaryDirectory() as scratch:
        own = (f"training.output_dir={scratch}/run", f"training.learning_rate={rate}")
        train_from_recipe(load_recipe(str(RECIPES / f"{name}.yaml"), [*ALWAYS, *changes, *own]))
        found = json.loads((Path(scratch) / "run/run.json").read_text())
    return {"case": case, "learning_rate": rate, **{key: found[key] for key in KEPT}}


def runs(cases: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    """Run all rates of some cases, as many at a time as asked; yield each as it ends."""
    spawn = multiprocessing.get_context("spawn")  # a process each: nothing of one run in the next
    with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        wanted = [pool.submit(run, case, rate) for case in cases for rate in CASES[case][2]]
        for done in as_completed(wanted):
            yield done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(__file__).parent / "results/rates.json"
    parser.add_argument("--only", nargs="*", choices=CASES, help="cases that are run again")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    cases = args.only or list(CASES)
    rows = json.loads(args.out.read_text())["runs"] if args.only and args.out.is_file() else []
    rows = [row for row in rows if row["case"] not in cases]
    for row in runs(cases, args.jobs):
        rows.append(row)
        rows.sort(key=lambda row: (list(CASES).index(row["case"]), row["learning_rate"]))
        result = {"machine": machine(), "runs": rows}
        args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
