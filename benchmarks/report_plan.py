"""The table of docs/plan.md: bytes that were planned, and those that a run took."""

from __future__ import annotations

from typing import Any

START, END = "<!-- from benchmarks/report.py -->\n", "<!-- end -->"
MIB = 2**20


def page(text: str, result: dict[str, Any]) -> str:
    """Return the page with its figures brought up to date."""
    before, _, rest = text.partition(START)
    return before + START + table(result) + END + rest.partition(END)[2]


def table(result: dict[str, Any]) -> str:
    """Describe `benchmarks/plan.py`."""
    rows, length = result["batch"]
    found = result["cases"].values()
    largest = max(abs(one["error"]) for one in found)
    lines = [
        f"`python benchmarks/plan.py`: the quickstart's model and its {rows} longest words, "
        f"{length} tokens each. Planned and measured are MiB at the peak of a step, the model's "
        "own weights included; the error of what comes on top of the bytes between two steps is "
        f"given as well. The largest error is {largest:.1%}.\n",
        "| | planned | measured | error | error beyond what is held |",
        "|---" * 5 + "|",
    ]
    for name, one in result["cases"].items():
        planned, measured, held = one["planned"], one["measured"], one["held"]
        beyond = (planned - measured) / max(1, measured - held)
        lines.append(
            f"| {name} | {planned / MIB:,.1f} | {measured / MIB:,.1f} | {one['error']:+.2%} "
            f"| {beyond:+.1%} |"
        )
    return "\n".join([*lines, ""])
