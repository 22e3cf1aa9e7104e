"""`data.columns`: columns under our names, or made of others by a template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sft.data.files import quiet
from sft.errors import UserError

PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")  # as in Python's formats, names of columns alone
MADE = "made: "  # before the name of a column while the others are still there


def renamed(rows: Any, columns: Mapping[str, str], name: str) -> Any:
    """Give columns the names that the recipe says, and make those that it gives templates for.

    Args:
        rows: a data set.
        columns: our name: theirs, or a template with theirs in braces.
        name: of the source, for messages.

    Raises:
        UserError: there is no such column.
    """
    check_columns(columns, rows.column_names, name)
    templates = {ours: theirs for ours, theirs in columns.items() if "{" in theirs}
    if templates:
        given = {"templates": templates, "classes": _classes(rows)}
        with quiet():
            rows = rows.map(_made, fn_kwargs=given, load_from_cache_file=False)
    taken = {ours: MADE + ours if ours in templates else theirs for ours, theirs in columns.items()}
    moved = {theirs: ours for ours, theirs in taken.items() if theirs != ours}
    replaced = (set(moved.values()) & set(rows.column_names)) - set(moved)
    return rows.remove_columns(sorted(replaced)).rename_columns(moved)


def renamed_row(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Do the same to one row; what lacks is None."""
    used = {theirs for theirs in columns.values() if "{" not in theirs}
    rest = {key: value for key, value in row.items() if key not in used and key not in columns}
    found = {
        ours: fill(theirs, row) if "{" in theirs else row.get(theirs)
        for ours, theirs in columns.items()
    }
    return rest | found


def check_columns(columns: Mapping[str, str], there: list[str], name: str) -> None:
    """Raise UserError on a column that is not there."""
    for ours, theirs in columns.items():
        wanted = [m[1] for m in PLACE.finditer(theirs) if m[1]] if "{" in theirs else [theirs]
        for column in wanted:
            if column not in there:
                raise UserError(
                    f"data.columns.{ours}: {name}: got {column!r}, allowed is "
                    f"{', '.join(there)}; change it"
                )


def fill(template: str, row: Mapping[str, Any]) -> str | None:
    """Put values in place of the names in braces; None where one is missing."""
    if any(row.get(m[1]) is None for m in PLACE.finditer(template) if m[1]):
        return None
    return PLACE.sub(lambda m: str(row[m[1]]) if m[1] else m[0][0], template)


def _made(
    row: dict[str, Any], templates: dict[str, str], classes: dict[str, list[str]]
) -> dict[str, Any]:
    """Fill the templates of a row; a class is called by its name."""
    named = dict(row)
    for column, names in classes.items():
        if isinstance(row[column], int) and 0 <= row[column] < len(names):
            named[column] = names[row[column]]
    return {MADE + ours: fill(template, named) for ours, template in templates.items()}


def _classes(rows: Any) -> dict[str, list[str]]:
    from datasets import ClassLabel

    features = rows.features.items()
    return {name: kind.names for name, kind in features if isinstance(kind, ClassLabel)}
