"""Plans as tables, and as data."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sft.plan.batch import Batch
from sft.plan.placement import ENGINE, SHOWN, Placement
from sft.plan.plan import Plan

GIB, MIB = 2**30, 2**20


def size(count: int) -> str:
    """Return bytes in a unit that fits."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def as_data(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values."""
    return {
        "method": plan.method,
        "trained": plan.trained,
        "total": plan.total,
        "device": plan.device.name,
        "device_memory": plan.device.memory,
        "bytes": plan.device_bytes,
        "peak": plan.peak,
        "needed": plan.needed,
        "fits": plan.fits,
        "host_bytes": plan.host_bytes,
        "gradients": plan.gradients,
        "activations": plan.activations,
        "seconds": plan.seconds,
    }


def show_plan(console: Console, plan: Plan, batch: Batch, placement: Placement) -> None:
    """Print one plan: what its peak consists of, and whether it fits."""
    console.print(
        f"{plan.method} trains {plan.trained:,} of {plan.total:,} weights; a batch of {batch.rows} "
        f"x {batch.length} tokens ({batch.source}); {placement.name}"
    )
    table = Table("at the peak of a step", "bytes", box=None)
    table.columns[1].justify = "right"
    for kind in (*SHOWN, ENGINE):
        if plan.device_bytes.get(kind):
            table.add_row(kind, size(plan.device_bytes[kind]))
    table.add_row("together", size(plan.peak))
    if plan.needed != plan.peak:
        table.add_row("with runtime and fragments", size(plan.needed))
    for kind, count in plan.host_bytes.items():
        table.add_row(f"on the host: {kind}", size(count))
    console.print(table)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    time = "" if plan.seconds is None else f"; about {plan.seconds:.3g} s a step"
    console.print(f"{verdict} {plan.device.name} with {size(plan.device.memory)}{time}")


def show_comparison(console: Console, plans: dict[str, Plan], note: str) -> None:
    """Print all methods side by side."""
    table = Table(title=note, title_justify="left")
    for name in ("method", "trained", "held", "gradients", "activations", "peak", "s / step", ""):
        table.add_column(name, justify="left" if name in ("method", "") else "right")
    for name, plan in plans.items():
        held = sum(plan.device_bytes.get(kind, 0) for kind in SHOWN[:5])
        seconds = "" if plan.seconds is None else f"{plan.seconds:.3g}"
        table.add_row(
            name, f"{plan.trained:,}", size(held), size(plan.gradients), size(plan.activations),
            size(plan.needed), seconds, "fits" if plan.fits else "too large",
        )  # fmt: skip
    console.print(table)
