"""`sft report`: make the report of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft.commands.arguments import user_errors


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    plots: Annotated[bool, typer.Option(help="Draw plots/*.png too, with matplotlib.")] = True,
) -> None:
    """Write report.html and plots/*.png of a run.

    Nothing but the files in its folder is read. `sft train` does so at its end. A run
    that is going on, or was cut short, has a report as well: of the updates that its log holds.

    For example:

        sft report runs/quickstart
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.report.write import write_report

        for line in write_report(run, plots=plots):
            print(line)
