"""Several processes that train without gradients: alike at the start, and in touch by numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from sft.optim.zeroth_order.engine import ALONE, Processes


def make_alike(accelerator: Any, model: nn.Module) -> None:
    """Give every process the weights of the first, as DDP does.

    What the processes add to their weights afterwards is the same to the bit.

    Args:
        accelerator: of the trainer.
        model: parameters and buffers of it are overwritten, on all but the first process.
    """
    if accelerator.num_processes == 1:
        return
    for tensor in chain(model.parameters(), model.buffers()):
        held = tensor.detach().to(accelerator.device).contiguous()
        torch.distributed.broadcast(held, src=0)
        tensor.detach().copy_(held)


@contextmanager
def unwrapped(accelerator: Any) -> Iterator[None]:
    """Keep models from being wrapped in DDP, which is for gradients and refuses what has none.

    Args:
        accelerator: of the trainer; prepares models as for evaluation while the context lasts.
    """
    if accelerator.num_processes == 1:
        yield
        return
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
    try:
        yield
    finally:
        del accelerator.prepare_model


def processes(accelerator: Any) -> Processes:
    """Return the processes of a run, which exchange fp64 numbers."""
    if accelerator.num_processes == 1:
        return ALONE

    def exchange(numbers: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor([list(numbers)], dtype=torch.float64, device=accelerator.device)
        rows: list[list[float]] = accelerator.gather(mine).tolist()
        return rows

    return Processes(accelerator.process_index, accelerator.num_processes, exchange)
