"""AdamW over many tensors at once, each entry bias-corrected by its own age."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sft.kernels.bias_scales import bias_scales
from sft.kernels.cpu.buckets import buckets
from sft.kernels.library import define, implementation
from sft.kernels.soft_threshold import shrink_many_
from sft.kernels.write import Home, write_each_


def sparse_adamw_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ages: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    reference: bool = False,
    taus: Sequence[float] = (),
    homes: Sequence[Home | None] = (),
) -> None:
    """Apply `sparse_adamw_step_` to each row of tensors; on a GPU in one launch.

    The same pass can shrink the new values by `soft_threshold` and then write them home: the
    weight of each home is read by nothing in between and written once.

    Args:
        values: each as for `sparse_adamw_step_`, and so on.
        grads: see there.
        exp_avgs: see there.
        exp_avg_sqs: see there.
        ages: see there.
        lr: see there.
        betas: see there.
        eps: see there.
        weight_decay: see there.
        reference: see there.
        taus: a threshold >= 0 for each value, or none.
        homes: a home or None for each value, or none.
    """
    rows = list(zip(values, grads, exp_avgs, exp_avg_sqs, ages, strict=True))
    housed = list(homes) or [None] * len(rows)
    kinds = [None if home is None else home.reference for home in housed]
    for kind in (None, False, True):
        chosen = [i for i, found in enumerate(kinds) if found is kind]
        if not chosen:
            continue
        some = [home for i in chosen if (home := housed[i]) is not None]
        # no one traces the update of an optimizer, and lists of hundreds cost an op 0.4 ms on a CPU
        plain = implementation(rows[chosen[0]][0].device) == "torch"
        run: Callable[..., None] = in_buckets_ if plain else _sparse_adamw_
        run(
            *([column[i] for i in chosen] for column in zip(*rows, strict=True)),
            lr,
            *betas,
            eps,
            weight_decay,
            reference,
            [taus[i] for i in chosen] if any(taus) else [],
            # .data: as `write_`, past autograd's version counter
            [home.weight.data for home in some],
            [home.indices for home in some],
            [home.originals for home in some],
            bool(kind),
        )


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


def adamw_reference(
    value: Tensor,
    grads: Sequence[Tensor],
    ages: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    reference: bool = False,
) -> Tensor:
    """Oracle of `sparse_adamw_step_`: algorithm 2 of arXiv 1711.05101, one number after another.

    Args:
        value: (k,) at the start, with moments of zero.
        grads: (k,) each, of one update after another.
        ages: (k,) updates that each entry has seen before.
        lr: and the rest, see `sparse_adamw_step_`.
        betas: see there.
        eps: see there.
        weight_decay: see there.
        reference: see there.

    Returns:
        (k,) float64, the values after the last update.
    """
    result = []
    for x, age, *series in zip(
        value.tolist(), ages.tolist(), *(grad.tolist() for grad in grads), strict=True
    ):
        m = v = 0.0
        for t, g in enumerate(series, start=age + 1):
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g * g
            c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
            if reference:
                x -= lr * m / ((math.sqrt(v) + eps) * c1 / math.sqrt(c2))
                x -= lr * weight_decay * x
            else:
                x -= lr * weight_decay * x
                x -= lr * (m / c1) / (math.sqrt(v / c2) + eps)
        result.append(x)
    return torch.tensor(result, dtype=torch.float64)


def in_buckets_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ages: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    reference: bool,
    taus: Sequence[float],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    reference_sums: bool,
) -> None:
    """Do what `sparse_adamw_` does in torch: small tensors joined, large ones in parts."""
    options: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    rows = zip(values, grads, exp_avgs, exp_avg_sqs, ages, strict=True)
    for bucket in buckets([list(row) for row in rows]):
        columns = [list(column) for column in zip(*bucket, strict=True)]
        joined = bucket[0] if len(bucket) == 1 else [torch.cat(column) for column in columns]
        sparse_adamw_step_(*joined, betas=(beta1, beta2), reference=reference, **options)
        if len(bucket) > 1:
            sizes = [value.numel() for value in columns[0]]
            for i in (0, 2, 3, 4):  # all but the gradient
                torch._foreach_copy_(columns[i], torch.split(joined[i], sizes))
    by_tau: dict[float, list[Tensor]] = {}
    for value, tau in zip(values, taus, strict=False):
        by_tau.setdefault(tau, []).append(value)
    for tau, some in by_tau.items():
        if tau:
            shrink_many_(some, tau, None)
    if weights:
        write_each_(weights, indices, values, originals, reference_sums)


_sparse_adamw_ = define(
    "sparse_adamw_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] ages, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool reference, float[] taus, Tensor(e!)[] weights, Tensor[] indices, "
    "Tensor[] originals, bool reference_sums) -> ()",
    plain=in_buckets_,
    triton="adamw:sparse_adamw_",
    fake=lambda *_: None,
)
