"""`sft replay`: rebuild the weights of a zeroth-order run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft.commands.arguments import user_errors


def replay(
    log: Annotated[
        Path,
        typer.Argument(metavar="LOG", help="The log of a zeroth-order run, or its run folder."),
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The model it started from; default: as logged.")
    ] = None,
    until: Annotated[
        int | None, typer.Option("--until", metavar="STEP", help="Stop after so many updates.")
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="merged: a stock model; adapter; delta: changed weights."),
    ] = "merged",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="Where to compute.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a filled folder.")
    ] = False,
) -> None:
    """Rebuild the weights of a zeroth-order run from its base and its log, bit for bit.

    For example:

        sft replay runs/mezo --to merged

        sft replay runs/mezo --until 500 --to earlier
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.export.replay import replay as rebuild

        done = rebuild(
            log, to=to, base=base, until=until, form=form, dtype=dtype, device=device,
            overwrite=overwrite,
        )  # fmt: skip
        cast = "" if dtype == "auto" else f" before the cast to {dtype}"
        proof = f"; the weights{cast} are the run's, bit for bit"
        if done.proven is None:
            proof = "; the log notes no hash of the weights there"
        print(f"{to}: {done.updates} updates replayed, {done.detail}{proof}")
