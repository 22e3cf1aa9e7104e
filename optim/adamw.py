"""AdamW whose bias correction follows the age of every single entry, for supports that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sft.kernels.sparse_adamw import sparse_adamw_
from sft.kernels.write import Home
from sft.optim.base import ExactOptimizer
from sft.optim.move import moved
from sft.optim.shards import local, zeros_like


class Homes(Protocol):
    """Knows the weights that trained values are written to after each update."""

    def find(self, parameter: Tensor) -> Home | None:
        """Return where a parameter's values live now, or None: they are not written."""

    def wrote(self, parameter: Tensor) -> None:
        """Take note that its values have just been written home."""


class SparseAdamW(ExactOptimizer):
    """AdamW (`sft.kernels.sparse_adamw`) with fp32 moments and an int32 age for each entry.

    State lies where its parameter does: of a DTensor it is one, placed alike.

    The weight decay acts on the value itself. For a delta that is a decay towards the pre-trained
    weight. Decay needs fp32 values: of a bf16 value, a shrink by less than 1/512 rounds to nothing.

    Args:
        params: parameters or groups; a 1-D vector of trained values or a dense tensor of any shape.
        lr: learning rate, >= 0.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled decay; one update shrinks a value by lr * weight_decay.
        reference: the conventions of the SpIEL authors' code, see `sparse_adamw_step_` there.
        homes: tells which values live in which weight; an update then writes both in one pass.

    Raises:
        ValueError: an option is out of range.

    Papers: AdamW, arXiv 1711.05101; SpIEL, arXiv 2401.16405. Unlike the SpIEL code, state is fp32
    whatever the dtype of the values, and an age counts the updates already applied.
    """

    per_entry = ("age", "exp_avg", "exp_avg_sq")
    # of a copy as well
    homes: Homes | None = None
    # asked by parameter and learning rate how much an update then shrinks it: `soft_threshold`
    threshold: Callable[[Tensor, float], float] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        reference: bool = False,
        homes: Homes | None = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "reference": reference})
        self.homes = homes

    def move_state(
        self,
        param: Tensor,
        source: Tensor,
        mean_grad: Tensor | None,
        mean_square: Tensor | None,
        updates: int,
        dim: int = 0,
    ) -> None:
        """Move state by index and seed grown entries; see `sft.optim.move.move_state`.

        Grown: age = updates, m = mean_grad * (1 - b1^updates), v = mean_square * (1 - b2^updates).
        """
        state = self.state.get(param)
        if not state:
            return
        group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        for key, mean, beta in zip(
            ("exp_avg", "exp_avg_sq"), (mean_grad, mean_square), group["betas"], strict=True
        ):
            grown = None if mean is None else mean * (1 - beta**updates)
            state[key] = moved(state[key], source, grown, dim)
        ages = torch.full(param.shape, updates, device=param.device)
        state["age"] = moved(state["age"], source, ages, dim)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        homes = [self.homes.find(p) for p in params] if self.homes else []
        columns = zip(*(self._entries(p) for p in params), strict=True)
        lr = float(group["lr"])
        sparse_adamw_(
            *map(list, columns),
            lr=lr,
            **{key: group[key] for key in ("betas", "eps", "weight_decay", "reference")},
            taus=[self.threshold(p, lr) for p in params] if self.threshold else [],
            homes=homes,
        )
        for param, home in zip(params, homes, strict=False):
            if self.homes and home:
                self.homes.wrote(param)

    def _entries(self, param: Tensor) -> list[Tensor]:
        """Return value, gradient, exp_avg, exp_avg_sq and age of a parameter."""
        grad = param.grad
        assert grad is not None
        if grad.is_sparse or param.is_complex():
            raise ValueError(
                f"params: got a {grad.layout} gradient of dtype {grad.dtype}, allowed are dense "
                "real ones; leave this parameter to another optimizer"
            )
        state = self.state[param]
        if not state:
            for key in self.per_entry:
                dtype = torch.int32 if key == "age" else torch.float32
                state[key] = zeros_like(param, dtype)
        entries = (param.detach(), grad, state["exp_avg"], state["exp_avg_sq"], state["age"])
        return [local(tensor) for tensor in entries]
