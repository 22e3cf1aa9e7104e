"""`sft compose`: read what is asked for, combine, and say what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sft.errors import UserError
from sft.tools.algebra import Request
from sft.tools.compose import Composed, compose
from sft.tools.describe import describe_change, sum_up
from sft.tools.show import line, percent, show_overlaps

_LARGE = 0.5  # a result that reaches more than this share of its weights is no sparse one


def run(
    operation: str,
    adapters: Sequence[Path],
    *,
    out: Path,
    weights: str | None,
    density: float | None,
    seed: int,
    base: str | None,
    overwrite: bool,
) -> None:
    """Combine adapters and print their conflicts and the result.

    Args:
        operation: a name of `sft.tools.algebra.OPERATIONS`.
        adapters: their folders.
        out: folder to write.
        weights: numbers with commas between them; default: 1 for each.
        density: share of positions that is kept.
        seed: of what is dropped at random.
        base: what they were trained on; default: as they say.
        overwrite: replace `out` when it is filled.
    """
    given = (1.0,) * len(adapters) if weights is None else _numbers(weights)
    request = Request(operation, given, density, seed)
    done = compose(adapters, request, out=out, base=base, overwrite=overwrite)
    console = Console()
    if done.conflicts:
        for number, adapter in enumerate(adapters, start=1):
            line(console, f"{number}  {adapter}")
        show_overlaps(console, done.conflicts)
    _show_result(console, out, done)


def _show_result(console: Console, out: Path, done: Composed) -> None:
    found = sum_up(describe_change(change) for change in done.changes.values())
    shape = f"{found['reached']:,} deltas in {len(done.changes)} modules"
    share = f"{percent(found['density'])} of their weights"
    line(console, f"{out}: {shape}, {share}, |delta| {found['delta_norm']:.3g}; read back, equal")
    if done.dropped:
        line(console, f"nothing is left of {len(done.dropped)} modules: {done.dropped[0]}, ...")
    if found["density"] > _LARGE:
        line(
            console,
            "the result is dense: `sft compose prune --density` makes it small, and "
            "`sft export --to merged` writes a stock model",
        )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--weights: got {text!r}; give numbers, such as 1,0.5") from None
