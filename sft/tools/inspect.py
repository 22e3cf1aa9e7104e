"""`sft inspect`: describe one folder, or several and what they have in common."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

from rich.console import Console

from sft.tools.compare import compare
from sft.tools.describe import describe_changes
from sft.tools.found import find_changes
from sft.tools.show import line, show_description, show_overlaps


def run(targets: Sequence[str], *, base: str | None, modules: bool, as_json: bool) -> None:
    """Print what each target changes, and the overlap of each two.

    Args:
        targets: folders of adapters, runs, deltas, or, with a base, models.
        base: what they are compared with; default: as they say.
        modules: print every module.
        as_json: print data alone.
    """
    changes = [find_changes(target, base) for target in targets]
    found = [describe_changes(one) for one in changes]
    numbered = list(enumerate(changes))
    overlaps = {
        (i, j): compare(one, other) for (i, one), (j, other) in itertools.combinations(numbered, 2)
    }
    if as_json:
        described = [{"folder": t, **f} for t, f in zip(targets, found, strict=True)]
        pairs = [
            {"first": targets[i], "second": targets[j], **row} for (i, j), row in overlaps.items()
        ]
        print(json.dumps({"adapters": described, "overlaps": pairs}, indent=2))
        return
    console = Console()
    for number, (target, one) in enumerate(zip(targets, found, strict=True), start=1):
        mark = f"{number}  " if overlaps else ""
        show_description(console, f"{mark}{target}", one, modules=modules)
    if overlaps:
        for number, target in enumerate(targets, start=1):
            line(console, f"{number}  {target}")
        show_overlaps(console, overlaps)
