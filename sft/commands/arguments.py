"""What several commands take, and how they fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from sft.errors import UserError

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe's.")
]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Print the user's own errors as one line and exit with 2; others keep their traceback."""
    try:
        yield
    except UserError as error:
        from sft.processes import say

        say(error)
        raise typer.Exit(2) from None
