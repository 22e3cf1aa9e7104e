"""`sft train`: run a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from sft.commands.arguments import Overrides, RecipeArgument, user_errors


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe; load no model.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines, no live bar.")] = False,
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, help="Start so many here, one for each GPU or socket."),
    ] = 1,
) -> None:
    """Fine-tune a model by a recipe.

    For example:

        sft train quickstart

        sft train my.yaml method.density=0.01 training.learning_rate=5e-3 --dry-run

        sft train my.yaml --processes 2

        torchrun --nproc_per_node 2 -m sft train my.yaml
    """
    with user_errors():
        if processes > 1 and not dry_run:
            from sft.processes import start

            start(processes, _train_arguments(recipe, overrides or [], plain=plain))
            return
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.recipe.load import load_recipe, to_yaml

        resolved = load_recipe(recipe, overrides or [])
        if dry_run:
            print(to_yaml(resolved), end="")
            return
        from rich.console import Console

        from sft.run.job import train_from_recipe

        console = Console(force_terminal=False) if plain else Console()
        train_from_recipe(resolved, console)


def _train_arguments(recipe: str, overrides: list[str], *, plain: bool) -> list[str]:
    """Return the command line of one process."""
    return ["train", recipe, *overrides, *(["--plain"] if plain else [])]
