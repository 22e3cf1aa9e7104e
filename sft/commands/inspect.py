"""`sft inspect`: what an adapter changes."""

from __future__ import annotations

from typing import Annotated

import typer

from sft.commands.arguments import BaseOption, JsonOption, ModulesOption, user_errors


def inspect(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER...", help="Of adapters, runs, deltas; models with --base."),
    ],
    base: BaseOption = None,
    modules: ModulesOption = False,
    json: JsonOption = False,
) -> None:
    """Tell what an adapter changes, by layer and by type of module.

    Trained values, sizes of the change, ranks. The base stays on disk. With several adapters,
    their overlaps are printed as well.

    For example:

        sft inspect runs/quickstart

        sft inspect runs/a/adapter runs/b/adapter --json

        sft inspect runs/full/merged --base smollm2-135m-instruct
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.tools.inspect import run

        run(targets, base=base, modules=modules, as_json=json)
