"""Give a parameter another size while it stays the object that optimizers and hooks know."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def resize_(parameter: nn.Parameter, data: Tensor) -> None:
    """Put `data`, of any shape, in place of the parameter's; its gradient is dropped.

    Optimizer state, keyed by the object, is moved by the caller; hooks stay. A graph made before
    must not be run backward any more.

    Args:
        parameter: keeps its identity, its hooks and requires_grad.
        data: dtype and device of the parameter.
    """
    assert data.dtype == parameter.dtype
    parameter.grad = None
    # autograd remembers a leaf's shape as long as a graph lives, and forgets it with the dtype
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
