"""Cases of `kernels/triton/select.py`: exact, whatever the ties, signs and lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from device_cases.base import HALVES, Build, Case
from torch import Tensor

from sft.kernels.magnitude_threshold import magnitude_threshold_reference
from sft.kernels.topk import top_k_reference

DTYPES = (torch.float32, *HALVES, torch.float64)
FEW = (torch.float32, torch.bfloat16)
TARGETS = ("sm_80", "sm_90", "sm_100")
SIZE = 70_001  # a chunk of whole blocks, and a part of a block


def _drawn(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).mul(0.02).to(dtype)


def _thresholds(share: float, dtypes: Sequence[torch.dtype] = FEW) -> Case:
    """Of several tensors and dtypes in one call."""

    def make(dtype: torch.dtype) -> tuple[list[Tensor]]:
        inf, small = math.inf, torch.finfo(dtype).smallest_normal
        special = torch.tensor([-0.0, inf, -1.5, 0.0, 1.5, -inf, small, -3.0], dtype=dtype)
        tied = torch.full((4096,), -0.5, dtype=dtype)
        return ([_drawn(SIZE, dtype), special, _drawn(1, torch.bfloat16), tied],)

    def run(weights: list[Tensor]) -> Tensor:
        from sft.kernels.triton.select import magnitude_thresholds

        return magnitude_thresholds(weights, share)

    def expected(weights: list[Tensor]) -> Tensor:
        found = [magnitude_threshold_reference(w, share) for w in weights]
        return torch.tensor(found, dtype=torch.float64)

    return Case(make=make, run=run, expected=expected, dtypes=dtypes)


def _strided() -> Case:
    def run(weight: Tensor) -> Tensor:
        from sft.kernels.triton.select import magnitude_thresholds

        return magnitude_thresholds([weight.t()[::2]], 0.4)

    return Case(
        make=lambda dtype: (_drawn(1200, dtype).view(30, 40),),
        run=run,
        expected=lambda weight: torch.tensor(
            [magnitude_threshold_reference(weight.t()[::2], 0.4)], dtype=torch.float64
        ),
    )


def _top(
    k: int, levels: int | None = None, size: int = 9_001, dtypes: Sequence[torch.dtype] = FEW
) -> Case:
    """Of scores of both signs; with few levels, of ties."""

    def make(dtype: torch.dtype) -> tuple[Tensor]:
        scores = _drawn(size, torch.float64)
        if levels is not None:
            scores = (scores * 20 * levels).round()  # with both zeros
        scores[size // 2], scores[size // 3] = math.inf, -math.inf
        return (scores.to(dtype),)

    def run(scores: Tensor) -> Tensor:
        from sft.kernels.triton.select import top_k

        return top_k(scores, k)

    return Case(
        make=make, run=run, expected=lambda scores: top_k_reference(scores, k), dtypes=dtypes
    )


CASES = (
    {f"thresholds, {share:g}": _thresholds(share) for share in (1e-9, 1.0)}
    | {"thresholds, 0.3": _thresholds(0.3, DTYPES), "thresholds, strided": _strided()}
    | {f"top {k}": _top(k) for k in (1, 9_000)}
    | {"top 45": _top(45, dtypes=DTYPES), "top 300 of ties": _top(300, 2, dtypes=DTYPES)}
    | {"top 4000 of ties": _top(4_000, 2)}
    | {"top of two": _top(1, size=2), "top of whole blocks": _top(700, size=8192)}
)


def _thresholds_build(dtype: torch.dtype, registers: tuple[int, int, int], launches: int) -> Build:
    def launch() -> None:
        from sft.kernels.triton.select import magnitude_thresholds

        magnitude_thresholds([torch.empty(SIZE, dtype=dtype, device="meta")], 0.5)

    return Build(launch, dict(zip(TARGETS, registers, strict=True)), launches=launches)


def _top_build() -> Build:
    def launch() -> None:
        from sft.kernels.triton.select import top_k

        top_k(torch.empty(SIZE, device="meta"), 100)

    return Build(launch, dict.fromkeys(TARGETS, 108), launches=6)


BUILDS = {
    "thresholds, float32": _thresholds_build(torch.float32, (72, 72, 72), 4),
    "thresholds, bfloat16": _thresholds_build(torch.bfloat16, (72, 72, 72), 2),
    "top": _top_build(),
}
SAMPLES = {
    "magnitude_thresholds": lambda: ([_drawn(50, torch.float32), _drawn(7, torch.float16)], 0.3),
    "top_k": lambda: (_drawn(50, torch.float32), 7),
}
