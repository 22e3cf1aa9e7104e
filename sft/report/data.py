"""The data of a run, as its report tells of it."""

from __future__ import annotations

from typing import Any

from sft.report.folder import Section

MOST_ROWS = 20  # of those that were left out
MOST_LETTERS = 4000  # of the example


def sources(section: Section) -> list[Section]:
    """Return where the rows come from."""
    return [row for row in _list(section, "sources") if isinstance(row, dict)]


def skipped(section: Section) -> list[Section]:
    """Return the first rows that were left out, and why."""
    return [row for row in _list(section, "skipped") if isinstance(row, dict)][:MOST_ROWS]


def preview(section: Section) -> list[tuple[str, bool]]:
    """Return the example's pieces, and whether the loss is taken there."""
    given = section.get("preview")
    segments = given.get("segments") if isinstance(given, dict) else None
    found: list[tuple[str, bool]] = []
    left = MOST_LETTERS
    for text, trained in segments or []:
        if left <= 0:
            return [*found, (" …", False)]
        found.append((text[:left], bool(trained)))
        left -= len(text)
    return found


def _list(section: Section, key: str) -> list[Any]:
    found = section.get(key)
    return found if isinstance(found, list) else []
