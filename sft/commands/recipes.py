"""`sft recipes`: the shipped ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft.commands.arguments import JsonOption, user_errors
from sft.errors import UserError

app = typer.Typer(help="List the shipped recipes; show or copy one.")


def complete_name(incomplete: str) -> list[tuple[str, str]]:
    """Complete the name of a shipped recipe in a shell."""
    from sft.recipe.shipped import shipped_recipes

    return [(name, text) for name, text in shipped_recipes() if name.startswith(incomplete)]


NameArgument = Annotated[
    str, typer.Argument(help="Name of a shipped recipe.", autocompletion=complete_name)
]


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the shipped recipes; show or copy one.

    For example:

        sft recipes

        sft recipes show quickstart

        sft recipes copy quickstart my.yaml
    """
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes(json: JsonOption = False) -> None:
    """List the shipped recipes, a line each: task, method, and what to expect."""
    from sft.tools.listing import run

    run(as_json=json)


@app.command("show")
def show_recipe(name: NameArgument) -> None:
    """Print a shipped recipe, comments and all."""
    with user_errors():
        from sft.recipe.shipped import find_recipe

        print(find_recipe(name).read_text(encoding="utf-8"), end="")


@app.command("copy")
def copy_recipe(
    name: NameArgument,
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
