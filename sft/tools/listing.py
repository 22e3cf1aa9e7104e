"""`sft recipes`: what each shipped recipe trains, how, and what to expect of it."""

from __future__ import annotations

import json
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft.recipe.expected import ExpectedSpec
from sft.recipe.shipped import find_recipe, shipped_recipes
from sft.recipe.source import read

_WIDE = 400  # characters of a line that goes to a pipe, where nothing is cut


class Listed(NamedTuple):
    """A line of the list."""

    name: str
    task: str
    method: str
    minutes: str
    summary: str
    expected: str


def listed() -> list[Listed]:
    """Return all shipped recipes, as far as they say it themselves: nothing is resolved."""
    found = []
    for name, summary in shipped_recipes():
        values = read(find_recipe(name)).values
        task = values.get("task", "sft")
        method = str(values["method"]["name"])
        if values.get("zeroth_order") is not None:
            method += ", zeroth order"
        expected = ExpectedSpec.model_validate(values.get("expected") or {})
        minutes = f"{expected.minutes:g}" if expected.minutes else ""
        named = str(task if isinstance(task, str) else task["name"])
        found.append(Listed(name, named, method, minutes, summary, expected.line()))
    return found


def run(*, as_json: bool = False) -> None:
    """Print a line for each; a terminal cuts summaries, a pipe gets them whole.

    Args:
        as_json: print data alone.
    """
    if as_json:
        print(json.dumps([row._asdict() for row in listed()], indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    cut = console.is_terminal
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="", expand=cut)
    shown = [key for key in Listed._fields if key != "expected" or not cut]
    for key in shown:
        justify: Literal["left", "right"] = "right" if key == "minutes" else "left"
        ratio = 1 if key == "summary" and cut else None  # the one that is cut
        table.add_column(key, no_wrap=True, justify=justify, overflow="ellipsis", ratio=ratio)
    for row in listed():
        table.add_row(*(Text(getattr(row, key)) for key in shown))
    console.print(table)
