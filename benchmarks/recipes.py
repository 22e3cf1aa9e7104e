"""Run every small recipe once, whole: what it gains, forgets, trains and costs.

`python benchmarks/recipes.py [--only NAME ...] [--jobs N] [--out FILE]`

These are the tests of `make test-recipes`, and those of `make test-engines` that run recipes in two
processes, with their results kept: a recipe that does not keep its promise is one that fails.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests/recipes/test_shipped.py"


def _test(name: str) -> str:
    what = "recipe_of_two_processes" if "_zero" in name else "small_recipe"
    return f"test_a_{what}_keeps_its_promise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = HERE / "results/recipes.json"
    parser.add_argument("--only", nargs="*", help="names of recipes; their results are renewed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    chosen = [f"{TESTS}::{_test(name)}[{name}]" for name in args.only or ()] or [str(TESTS)]
    spread = ["-n", str(args.jobs), "--dist", "worksteal"] if args.jobs > 1 else []
    sys.exit(
        pytest.main([*chosen, "-m", "recipes or engines", *spread, "--results", str(args.out)])
    )


if __name__ == "__main__":
    main()
