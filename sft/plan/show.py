"""Plans as tables, and as data."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sft.plan.advice import Step
from sft.plan.batch import Batch
from sft.plan.compare import RANK
from sft.plan.placement import ENGINE, SHOWN, Placement
from sft.plan.plan import Plan
from sft.plan.timeline import HELD

GIB, MIB = 2**30, 2**20


def size(count: int) -> str:
    """Return bytes in a unit that fits."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"


def short(count: float, units: tuple[str, ...], step: int) -> str:
    """Return a number in three digits, in the unit that fits: narrow columns hold it."""
    power = 0
    while count >= step and power < len(units) - 1:
        count, power = count / step, power + 1
    digits = 0 if count >= 100 else 1 if count >= 10 else 2
    return f"{count:,.{digits}f} {units[power]}"


def short_size(count: int) -> str:
    """Return bytes in three digits."""
    return short(count / MIB, ("MiB", "GiB", "TiB"), 1024)


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
    table.add_row("together, tensors of one process", size(plan.peak))
    if plan.needed != plan.peak:
        table.add_row("with runtime and fragments", size(plan.needed))
    table.add_row("(kept for backward, at most", f"{size(plan.activations)})")
    for kind, count in plan.host_bytes.items():
        table.add_row(f"on the host: {kind}", size(count))
    console.print(table)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    time = "" if plan.seconds is None else f"; about {plan.seconds:.3g} s a step"
    console.print(f"{verdict} {plan.device.name} with {size(plan.device.memory)}{time}")


def show_advice(console: Console, steps: list[Step]) -> None:
    """Print what to change, one change on top of another."""
    if not steps:
        console.print("nothing that was tried makes it smaller: take a smaller model or --world")
        return
    table = Table(title="to make it fit, one on top of another", title_justify="left", box=None)
    for name in ("set", "needs", "s / step", "its price", ""):
        right = name in ("needs", "s / step")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for step in steps:
        seconds = "" if step.plan.seconds is None else f"{step.plan.seconds:.3g}"
        verdict = "fits" if step.plan.fits else "still too large"
        table.add_row(step.change, short_size(step.plan.needed), seconds, step.cost, verdict)
    console.print(table)


def show_comparison(console: Console, plans: dict[str, Plan]) -> None:
    """Print all methods side by side."""
    title = f"all methods, with as many weights as a LoRA of rank {RANK} trains"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("method", "trains", "held", "for backward", "needs", "s / step", ""):
        left = name in ("method", "")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for name, plan in plans.items():
        held = sum(plan.device_bytes.get(kind, 0) for kind in HELD)
        seconds = "" if plan.seconds is None else f"{plan.seconds:.3g}"
        table.add_row(
            name, short(plan.trained / 1e6, ("M", "B"), 1000), short_size(held),
            short_size(plan.activations), short_size(plan.needed), seconds,
            "fits" if plan.fits else "no",
        )  # fmt: skip
    console.print(table)
