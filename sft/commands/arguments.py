"""What several commands take, and how they fail."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from typing import Annotated

import typer

from sft.errors import UserError


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Complete the name of a shipped recipe, or of a YAML file, in a shell."""
    from sft.commands.recipes import complete_name

    files = sorted(glob.glob(f"{glob.escape(incomplete)}*.yaml"))
    return [*complete_name(incomplete), *((file, "") for file in files)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a shipped recipe.",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe's.")
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="Hub id, folder or embedded name; default: what it was made for."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print data alone.")]
ModulesOption = Annotated[bool, typer.Option("--modules", help="Print every module.")]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Print the user's own errors as one line and exit with 2; others keep their traceback."""
    try:
        yield
    except UserError as error:
        from sft.processes import say

        say(error)
        raise typer.Exit(2) from None
