"""The tables of docs/recipes.md: what ships, what it promises, and what it was measured to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

START, END = "<!-- from benchmarks/report.py -->\n", "<!-- end -->"
RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = "smollm2-135m-instruct"


def page(text: str, measured: dict[str, Any]) -> str:
    """Return the page with its tables brought up to date."""
    before, _, rest = text.partition(START)
    return before + START + tables(measured) + END + rest.partition(END)[2]


def tables(measured: dict[str, Any]) -> str:
    """Return a table of the small recipes, and one of the large ones."""
    recipes = {p.stem: yaml.safe_load(p.read_text()) for p in sorted(RECIPES.glob("*.yaml"))}
    small = {name: r for name, r in recipes.items() if r["model"]["name"] == SMALL}
    rows = [
        "## Small ones\n",
        "SmolLM2-135M, on the data embedded in the package. Measured by "
        "`python benchmarks/recipes.py --jobs 2`, one run each, two at a time with a core each: "
        "the minutes are of one core. The loss on general text tells what was forgotten.\n",
        "| recipe | task | method | trained | expected | measured | general text | minutes |",
        "|---" * 8 + "|",
        *(_small(name, r, measured["recipes"].get(name)) for name, r in small.items()),
        "",
        "## Large ones\n",
        "| recipe | model | task | method | memory | source |",
        "|---" * 6 + "|",
        *(_large(name, r) for name, r in recipes.items() if name not in small),
        "",
    ]
    return "\n".join(rows) + "\n"


def _small(name: str, recipe: dict[str, Any], run: dict[str, Any] | None) -> str:
    expected = recipe.get("expected", {})
    bounds = ", ".join(f"{k} {v}" for k, v in expected.get("metrics", {}).items())
    cells = [f"`{name}`", task(recipe), method(recipe)]
    if run is None:
        return f"| {' | '.join([*cells, '', bounds, '', '', str(expected.get('minutes', ''))])} |"
    found = ", ".join(
        f"{key} {run['before'][key]:.2f} → {value:.2f}"
        for key, value in run["after"].items()
        if key in run["before"]
    )
    minutes = sum(run["seconds"].values()) / 60
    trained = f"{run['trained_weights'] / run['all_weights']:.2%}"
    text = run.get("forgetting") or {}
    loss = f"{text['loss_before']:.2f} → {text['loss_after']:.2f}" if text else ""
    return f"| {' | '.join([*cells, trained, bounds, found, loss, f'{minutes:.1f}'])} |"


def _large(name: str, recipe: dict[str, Any]) -> str:
    expected = recipe.get("expected", {})
    memory = f"{expected['memory_gb']:g} GB" if "memory_gb" in expected else ""
    cells = [f"`{name}`", recipe["model"]["name"], task(recipe), method(recipe), memory]
    return f"| {' | '.join([*cells, expected.get('source', '')])} |"


def spells(name: str) -> bool:
    """Tell whether a recipe trains on the quickstart's words."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    return bool(recipe["data"].get("train") == "cmudict")


def task(recipe: dict[str, Any]) -> str:
    """Return the name of a recipe's task."""
    found = recipe.get("task", "sft")
    return str(found if isinstance(found, str) else found["name"])


def method(recipe: dict[str, Any]) -> str:
    """Return what a recipe trains, and how, in a few words."""
    name = str(recipe["method"]["name"])
    if (section := recipe.get("zeroth_order")) is None:
        return name
    kind = "Sparse MeZO" if section.get("sparsity") else "MeZO"
    return kind if name == "full" else f"{kind} of {name}"
