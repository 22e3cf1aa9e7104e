"""Where a step goes: milliseconds of self CPU time by part of the step and kind of operation."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile


def profile(step: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Return {part: {operation: milliseconds}} of one step, parts as in `Case.step`."""
    with _silent(), torch_profile(activities=[ProfilerActivity.CPU]) as run:
        step()
    found: dict[str, Counter[str]] = {}
    for event in run.events():
        part, name = _part(event), event.name.rpartition("::")[2]
        if part is not None and event.self_cpu_time_total > 0:
            own = "python" if event.name.startswith("part: ") else name
            found.setdefault(part, Counter())[own] += event.self_cpu_time_total / 1000
    return {
        part: {name: round(ms, 2) for name, ms in times.most_common() if ms >= 0.01}
        for part, times in found.items()
    }


@contextmanager
def _silent() -> Iterator[None]:
    """Send what the profiler's own library prints of its start and end to nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _part(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith("part: "):
            return str(event.name.removeprefix("part: "))
        event = event.cpu_parent
    return None
