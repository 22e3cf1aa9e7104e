"""Where a step goes: milliseconds of self CPU time by part of the step and kind of operation."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_addmm_activation"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "loss": (
        "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward",
    ),
    "sparse gradients": ("sparse_sampled_addmm", "outer_at", "gradient_at", "sampled"),
    "reading and writing positions": (
        "index_select", "index_copy_", "index_put_", "_index_put_impl_", "index", "index_add_",
        "scatter_add", "scatter_add_", "gather", "write_", "take", "put_", "embedding",
        "embedding_dense_backward",
    ),
    "copies": ("copy_", "cat", "clone", "_to_copy", "fill_", "zero_", "_foreach_copy_"),
    "optimizer": ("_fused_adamw_", "sparse_adamw_", "sparse_adamw"),
    "ranking": ("topk", "sort", "kthvalue", "nonzero", "bincount", "masked_select", "searchsorted"),
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
REST = "elementwise and the rest"


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


def by_kind(times: dict[str, float]) -> Counter[str]:
    """Add the milliseconds of operations up by kind."""
    kinds: Counter[str] = Counter()
    for name, ms in times.items():
        kinds["python" if name == "python" else _KIND_OF.get(name, REST)] += ms
    return kinds


def _part(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith("part: "):
            return str(event.name.removeprefix("part: "))
        event = event.cpu_parent
    return None
