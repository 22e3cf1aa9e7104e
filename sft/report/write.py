"""A run's report and plots, written into its folder."""

from __future__ import annotations

import os
from pathlib import Path

from sft.report.folder import read_run
from sft.report.page import page
from sft.report.plots import can_plot, write_plots
from sft.run.folder import PLOTS, REPORT


def write_report(folder: Path, *, plots: bool = True) -> list[str]:
    """Write report.html and plots/*.png of a run; nothing else than its folder is read.

    Args:
        folder: of the run.
        plots: draw them, where matplotlib is installed.

    Returns:
        lines that say what was written, and what was not.

    Raises:
        UserError: the folder holds no run, or a broken one.
    """
    run = read_run(folder)
    html = page(run)
    temporary = folder / f".{REPORT}"
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, folder / REPORT)
    said = [f"report in {folder / REPORT}"]
    if not plots:
        return said
    if not can_plot():
        return [*said, "no plots: matplotlib is not installed; pip install 'sparse-sft[plot]'"]
    drawn = write_plots(run)
    return [*said, f"{len(drawn)} plots in {folder / PLOTS}"] if drawn else said
