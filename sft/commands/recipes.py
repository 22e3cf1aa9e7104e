"""`sft recipes`: the shipped ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft.commands.arguments import user_errors
from sft.errors import UserError

app = typer.Typer(no_args_is_help=True, help="List, show and copy the shipped recipes.")


@app.command("list")
def list_recipes() -> None:
    """List the shipped recipes."""
    from sft.recipe.shipped import shipped_recipes

    found = shipped_recipes()
    width = max((len(name) for name, _ in found), default=0)
    for name, summary in found:
        print(f"{name:<{width}}  {summary}")


@app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """Print a shipped recipe, comments and all."""
    with user_errors():
        from sft.recipe.shipped import find_recipe

        print(find_recipe(name).read_text(encoding="utf-8"), end="")


@app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    destination: Annotated[Path, typer.Argument(help="File or folder to write.")] = Path("."),
) -> None:
    """Copy a shipped recipe, to make it your own; an existing file is never replaced."""
    with user_errors():
        from sft.recipe.shipped import find_recipe

        source = find_recipe(name)
        target = destination / source.name if destination.is_dir() else destination
        try:
            with target.open("x", encoding="utf-8") as file:
                file.write(source.read_text(encoding="utf-8"))
        except FileExistsError:
            raise UserError(f"{target}: exists; give another name") from None
        except OSError as error:
            raise UserError(f"{target}: cannot be written ({error.strerror})") from error
        print(target)
