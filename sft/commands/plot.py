"""`sft plot`: curves and a map, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft.commands.arguments import user_errors


def plot(
    target: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of a run, an adapter or a delta.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write: .png, .svg or .pdf.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Of a whole model, what it is compared with.")
    ] = None,
) -> None:
    """Draw a run's curves, and where its adapter changes the model.

    The map shows modules by layer and type.

    For example:

        sft plot runs/quickstart --out run.png

        sft plot adapter --out map.svg
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.tools.plot import names
        from sft.tools.plot import plot as draw

        drawn = draw(target, out, base)
        print(f"{out}: {names(drawn)}")
