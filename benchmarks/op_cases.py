"""Ops at a size of production, each beside what plain torch would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft.kernels.add import add_
from sft.kernels.displace import displace
from sft.kernels.gather import gather
from sft.kernels.kept import keep, restore
from sft.kernels.outer_at import outer_at
from sft.kernels.pattern import Pattern
from sft.kernels.soft_threshold import soft_threshold_many_
from sft.kernels.sparse_adamw import sparse_adamw_
from sft.kernels.topk import top_k
from sft.kernels.write import write_

SIDE, TOKENS = 2048, 512
COUNT = SIDE * SIDE // 100
LAYERS = 16


@dataclass(frozen=True)
class OpCase:
    """An op and its plain counterpart on the same data.

    Args:
        about: shape, dtype, share.
        beside: what the counterpart is.
        make: from a device to both calls.
    """

    about: str
    beside: str
    make: Callable[[str], tuple[Callable[[], object], Callable[[], object]]]


def _weight(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SIDE, SIDE, device=device).to(dtype)


def _at(device: str, count: int = COUNT) -> Tensor:
    return torch.randperm(SIDE * SIDE)[:count].sort().values.int().to(device)


def _gather(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    weight, at = _weight(device), _at(device)
    wide = at.long()
    return lambda: gather(weight, at), lambda: weight.view(-1)[wide]


def _write(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    weight, at = _weight(device), _at(device)
    wide, values = at.long(), torch.randn(COUNT, device=device)
    flat = weight.view(-1)
    return lambda: write_(weight, at, values), lambda: flat.__setitem__(wide, values)


def _add(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    weight, at = _weight(device), _at(device)
    wide, values = at.long(), torch.randn(COUNT, device=device)
    flat = weight.view(-1)
    return lambda: add_(weight, at, values), lambda: flat.__setitem__(wide, flat[wide] + values)


def _outer(share: float) -> Callable[[str], tuple[Callable[[], object], Callable[[], object]]]:
    def make(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
        left, right = (torch.randn(TOKENS, SIDE, device=device) for _ in range(2))
        pattern = Pattern(_at(device, int(SIDE * SIDE * share)), (SIDE, SIDE))
        wide = pattern.indices.long()

        def dense() -> Tensor:
            return (left.t() @ right).view(-1).index_select(0, wide)

        return lambda: outer_at(left, right, pattern), dense

    return make


def _adamw(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    sizes = [COUNT // 2 + i for i in range(LAYERS)]
    rows = [[torch.randn(k, device=device).abs() for k in sizes] for _ in range(4)]
    ages = [torch.zeros(k, dtype=torch.int32, device=device) for k in sizes]
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    stock = [torch.nn.Parameter(value.clone()) for value in rows[0]]
    for parameter, grad in zip(stock, rows[1], strict=True):
        parameter.grad = grad
    fused = torch.optim.AdamW(stock, lr=1e-4, weight_decay=0.0, fused=True)
    return lambda: sparse_adamw_(*rows, ages, **options), fused.step


def _soft_threshold(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    gates = [torch.randn(16, device=device) for _ in range(210)]

    def plain() -> None:
        for gate in gates:
            gate.copy_(gate.sign() * (gate.abs() - 1e-4).clamp(min=0))

    return lambda: soft_threshold_many_(gates, 1e-4), plain


def _displace(kind: str) -> Callable[[str], tuple[Callable[[], object], Callable[[], object]]]:
    def make(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
        weight = _weight(device)
        draw = [(7, 1e-3)]
        return (
            lambda: displace([weight], [0], draw, kind=kind, out=[weight]),
            lambda: weight.add_(torch.randn_like(weight), alpha=-1e-3),
        )

    return make


def _top_k(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    scores = _weight(device).view(-1).abs()
    return lambda: top_k(scores, COUNT), lambda: torch.topk(scores, COUNT).indices.sort().values


def _keep(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    x = torch.randn(TOKENS, SIDE, device=device)
    return lambda: restore(keep(x, "int8"), x.dtype), lambda: x.clone()


OPS = {
    "gather": OpCase("2048 x 2048, 1 %, fp32", "W.flat[i]", _gather),
    "write_": OpCase("2048 x 2048, 1 %, fp32", "W.flat[i] = v", _write),
    "add_": OpCase("2048 x 2048, 1 %, fp32", "W.flat[i] += v", _add),
    "outer_at, 0.5 %": OpCase("2048 x 2048, 512 tokens", "dense + gather", _outer(0.005)),
    "outer_at, 5 %": OpCase("2048 x 2048, 512 tokens", "dense + gather", _outer(0.05)),
    "sparse_adamw_": OpCase("16 x 21 k values, own ages", "torch fused AdamW, one age", _adamw),
    "soft_threshold_many_": OpCase("210 x 16 gates", "a loop", _soft_threshold),
    "displace, rademacher": OpCase("2048 x 2048, fp32", "W += c randn", _displace("rademacher")),
    "displace, gaussian": OpCase("2048 x 2048, fp32", "W += c randn", _displace("gaussian")),
    "displace, gaussian_table": OpCase(
        "2048 x 2048, fp32", "W += c randn", _displace("gaussian_table")
    ),
    "top_k": OpCase("4.2 M scores, 1 %", "torch.topk + sort", _top_k),
    "keep + restore, int8": OpCase("512 x 2048, fp32", "a copy", _keep),
}
