"""The recipes of large models are planned from their configurations, and take what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
RECIPES = sorted((HERE.parents[1] / "recipes").glob("*.yaml"))
SMALL = "smollm2-135m-instruct"
READ = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in RECIPES}
LARGE = [name for name, recipe in READ.items() if recipe["model"]["name"] != SMALL]
GIGABYTE = 1e9


@pytest.mark.recipes
def test_large_recipes_take_the_memory_that_they_say(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "plan_large.py"), str(tmp_path), *LARGE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    said = {name: READ[name]["expected"]["memory_gb"] for name in LARGE}
    planned = {name: found[name]["peak"] / GIGABYTE for name in LARGE}
    assert planned == pytest.approx(said, rel=0.1)
