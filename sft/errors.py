"""Errors that are the user's to mend: one line each, no traceback on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A request that cannot be honoured; the message is one line with the remedy in it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RecipeError(UserError):
    """A recipe that says something we do not understand; names file, line and dotted key."""


def one_line(text: object) -> str:
    """Collapse all white space, so that a message of several lines fits on one."""
    return " ".join(str(text).split())


def unknown_name(found: str, allowed: Iterable[str], *, kind: str = "key") -> str:
    """Say that a name is unknown, with its nearest neighbour, or all choices when none is near."""
    choices = sorted(allowed)
    near = difflib.get_close_matches(found, choices, n=1, cutoff=0.6)
    if near:
        return f"unknown {kind}; did you mean {near[0]!r}?"
    return f"unknown {kind}; allowed: {', '.join(choices)}"
