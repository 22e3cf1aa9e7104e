"""What DistributedDataParallel does that a sparse method has no use for."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def leave_buffers(wrapped: Any, *, asked: bool | None) -> None:
    """Let DDP send the buffers once, when it wraps, and not again with every forward pass.

    Ours are indices: as many bytes as the values have, and alike on all ranks by construction. DDP
    writes them where tensors' version counters do not see it. Statistics that batches change are
    still sent.

    Args:
        wrapped: a model, in DDP or not.
        asked: what the user wants of DDP's `broadcast_buffers`, None for no opinion.
    """
    if isinstance(wrapped, DistributedDataParallel) and asked is None:
        wrapped.broadcast_buffers = _changes_in_forward(wrapped.module)


def _changes_in_forward(model: nn.Module) -> bool:
    return any(name.split(".")[-1].startswith("running_") for name, _ in model.named_buffers())
