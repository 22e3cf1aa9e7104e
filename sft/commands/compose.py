"""`sft compose`: one adapter out of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft.commands.arguments import BaseOption, user_errors


def compose(
    operation: Annotated[
        str,
        typer.Argument(
            metavar="OPERATION",
            help="add, subtract, scale, union, intersect, prune, ties, dare or dare-ties.",
        ),
    ],
    adapters: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Of adapters, or of runs.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="Of each adapter, such as 1,0.5; default: 1 for each."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="Share of positions kept by prune, ties, dare, dare-ties."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what dare drops.")] = 0,
    base: BaseOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a filled folder.")
    ] = False,
) -> None:
    """Combine adapters of one base into one, without loading the base.

    Each weight's changes are combined on the positions that any adapter reaches. What comes out
    is a static SpIEL delta, exact in float32, that loads as any adapter.

    For example:

        sft compose add runs/a runs/b --out both

        sft compose ties runs/a runs/b runs/c --density 0.2 --weights 1,1,0.5 --out merged

        sft compose prune runs/a --density 0.1 --out small
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.tools.compose_command import run

        run(
            operation, adapters, out=out, weights=weights, density=density, seed=seed, base=base,
            overwrite=overwrite,
        )  # fmt: skip
