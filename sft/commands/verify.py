"""`sft verify`: is an adapter whole, and does it fit its base?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft.commands.arguments import BaseOption, JsonOption, user_errors


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of an adapter, a run, or a delta.")
    ],
    base: BaseOption = None,
    support: Annotated[
        str | None,
        typer.Option("--support", help="Start of the SHA-256 that its support must have."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a saved adapter against its base; exit with 1 unless all is well.

    Looks at files, settings, finite values, shapes, positions in order and in range, fingerprints
    of the base weights, the hash of the support, and versions. Base weights are read one at a time.

    For example:

        sft verify runs/quickstart

        sft verify adapter --base HuggingFaceTB/SmolLM2-135M --support 9e9f5e07
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.tools.verify_command import run

        if not run(folder, base=base, support=support, as_json=json):
            raise typer.Exit(1)
