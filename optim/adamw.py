"""AdamW whose bias correction follows the age of every single entry, for supports that change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sft.optim.base import ExactOptimizer
from sft.optim.bias import bias_scales
from sft.optim.buckets import buckets
from sft.optim.move import moved


class SparseAdamW(ExactOptimizer):
    """AdamW (`sparse_adamw_step_`) with fp32 moments and an int32 age for each entry.

    The weight decay acts on the value itself. For a delta that is a decay towards the pre-trained
    weight. Decay needs fp32 values: of a bf16 value, a shrink by less than 1/512 rounds to nothing.

    Args:
        params: parameters or groups; a 1-D vector of trained values or a dense tensor of any shape.
        lr: learning rate, >= 0.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled decay; one update shrinks a value by lr * weight_decay.
        reference: the conventions of the SpIEL authors' code, see `sparse_adamw_step_`.

    Raises:
        ValueError: an option is out of range.

    Papers: AdamW, arXiv 1711.05101; SpIEL, arXiv 2401.16405. Unlike the SpIEL code, state is fp32
    whatever the dtype of the values, and an age counts the updates already applied.
    """

    per_entry = ("age", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        reference: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "reference": reference})

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
        options = {key: group[key] for key in ("betas", "eps", "weight_decay", "reference")}
        for bucket in buckets([self._entries(p) for p in params]):
            if len(bucket) == 1:
                sparse_adamw_step_(*bucket[0], lr=float(group["lr"]), **options)
                continue
            columns = [list(column) for column in zip(*bucket, strict=True)]
            joined = [torch.cat(column) for column in columns]
            sparse_adamw_step_(*joined, lr=float(group["lr"]), **options)
            sizes = [value.numel() for value in columns[0]]
            for i in (0, 2, 3, 4):  # all but the gradient
                torch._foreach_copy_(columns[i], torch.split(joined[i], sizes))

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
                state[key] = torch.zeros(param.shape, dtype=dtype, device=param.device)
        return [param.detach(), grad, state["exp_avg"], state["exp_avg_sq"], state["age"]]


def sparse_adamw_step_(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    reference: bool = False,
) -> None:
    """Apply one AdamW update in place, each entry bias-corrected by its own age.

        a = age + 1;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        c1 = 1 - b1^a;  c2 = 1 - b2^a
        value = (1 - lr wd) value - lr (m / c1) / (sqrt(v / c2) + eps)

    With `reference`, as in the SpIEL authors' code, eps is not corrected and decay comes last:

        value = (1 - lr wd) (value - lr m sqrt(c2) / c1 / (sqrt(v) + eps))

    Args:
        value: floating, any shape; below fp32 it is updated in fp32 and rounded once.
        grad: floating, shape of value.
        exp_avg: m, fp32, shape of value.
        exp_avg_sq: v, fp32, shape of value.
        age: int32, shape of value, contiguous; updates already applied.
        lr: learning rate.
        betas: b1, b2.
        eps: see the equation.
        weight_decay: wd.
        reference: see the equation.

    Papers: AdamW, arXiv 1711.05101; SpIEL, arXiv 2401.16405 (one age per entry).
    """
    work = value.to(torch.promote_types(value.dtype, torch.float32))
    grad = grad.to(torch.float32)
    shrink = 1 - lr * weight_decay
    age.add_(1)
    m_scale, root_scale = bias_scales(age, betas, reference)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().mul_(root_scale).add_(eps)
    if weight_decay and not reference:
        work.mul_(shrink)
    work.addcdiv_(m_scale.mul_(exp_avg), denominator, value=-lr)
    if weight_decay and reference:
        work.mul_(shrink)
    if work is not value:
        value.copy_(work)
