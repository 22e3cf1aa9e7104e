"""`sft diff`: how two adapters differ."""

from __future__ import annotations

from typing import Annotated

import typer

from sft.commands.arguments import BaseOption, JsonOption, ModulesOption, user_errors


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="Adapter, run, delta or model.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one, or the base of A.")],
    base: BaseOption = None,
    modules: ModulesOption = False,
    json: JsonOption = False,
) -> None:
    """Compare two adapters: positions in common, opposite signs, distance of the values.

    A whole model is compared by what it changes of the other's base; of two whole models, the
    second one is the base.

    For example:

        sft diff runs/a runs/b

        sft diff runs/a/merged smollm2-135m-instruct

        sft diff runs/a/merged runs/a/adapter
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.tools.diff import run

        run(first, second, base=base, modules=modules, as_json=json)
