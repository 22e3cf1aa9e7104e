"""Cases of `kernels/triton/displace_at.py`: the bits are those of the whole tensor."""

from __future__ import annotations

from typing import Any

import torch
from device_cases.base import HALVES, Build, Case
from device_cases.displace import DRAWS, MASKS, PARAMETER, _close, split
from torch import Tensor

from sft.kernels.displace_at import displace_at_reference
from sft.kernels.displace_rows import displace_rows_reference
from sft.kernels.mask import Magnitude, Mask, Random, coded
from sft.kernels.noise import KINDS, noise_reference, signed

DTYPES = (torch.float32, *HALVES, torch.float64)


def _table(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows + width)
    return torch.randn(rows, width, generator=generator).to(dtype)


def _options(mask: Mask | None, kind: str) -> tuple[Any, ...]:
    (chosen,), (key,), (limit,) = coded([mask])
    return PARAMETER, chosen, key, limit, *split(DRAWS), kind


def _positions(mask: Mask | None, kind: str, dtypes: Any = DTYPES) -> Case:
    """Unsorted, twice the same, of two dimensions; of a transposed weight."""

    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        positions = torch.randint(90 * 130, (3, 401), generator=generator)
        return _table(90, 130, dtype).t(), positions.to(torch.int32)

    def run(weight: Tensor, positions: Tensor) -> Tensor:
        from sft.kernels.triton.displace_at import displace_at

        return displace_at(weight, positions, *_options(mask, kind))

    def expected(weight: Tensor, positions: Tensor) -> Tensor:
        return displace_at_reference(weight, positions, PARAMETER, DRAWS, kind=kind, mask=mask)

    close = _close if kind == "gaussian" else None
    return Case(make=make, run=run, expected=expected, dtypes=dtypes, tolerance=close)


def _rows(width: int, mask: Mask | None, kind: str, dtypes: Any = DTYPES) -> Case:
    """Unsorted, twice the same, the first and the last."""

    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _table(12, width, dtype), torch.tensor([11, 0, 7, 7, 1])

    def run(weight: Tensor, rows: Tensor) -> Tensor:
        from sft.kernels.triton.displace_at import displace_rows

        return displace_rows(weight, rows, *_options(mask, kind))

    def expected(weight: Tensor, rows: Tensor) -> Tensor:
        return displace_rows_reference(weight, rows, PARAMETER, DRAWS, kind=kind, mask=mask)

    close = _close if kind == "gaussian" else None
    return Case(make=make, run=run, expected=expected, dtypes=dtypes, tolerance=close)


def _nothing() -> Case:
    def run(weight: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
        from sft.kernels.triton.displace_at import displace_at, displace_rows

        options = _options(None, "rademacher")
        return displace_at(weight, none, *options), displace_rows(weight, none, *options)

    return Case(
        make=lambda dtype: (_table(3, 4, dtype), torch.empty(0, dtype=torch.int64)),
        run=run,
        expected=lambda weight, none: (weight.new_empty(0), weight.new_empty(0, 4)),
    )


def _noise(kind: str) -> Case:
    """Also where indices and counters pass 32 bits; of positions that lie apart."""

    def make(dtype: torch.dtype) -> tuple[Tensor]:
        ends = torch.tensor([0, 1, 4095, 4096, 2**31 - 1, 2**31, 2**43 + 3])
        generator = torch.Generator().manual_seed(0)
        made = torch.cat([ends, torch.randint(2**45, (600,), generator=generator)])
        return (torch.stack([made, made.flip(0)], 1)[:, 0],)

    def run(positions: Tensor) -> Tensor:
        from sft.kernels.triton import displace_at

        return displace_at.noise_at(positions, signed(2**63 + 5), PARAMETER, kind)

    def expected(positions: Tensor) -> Tensor:
        z = [noise_reference(2**63 + 5, PARAMETER, i, kind=kind) for i in positions.tolist()]
        return torch.tensor(z)

    return Case(
        make=make,
        run=run,
        expected=expected,
        dtypes=(torch.float32,),
        tolerance=_close if kind == "gaussian" else None,
    )


_WIDTHS = {"even": 576, "odd": 1023, "narrow": 3}
CASES = (
    {
        f"positions, {kind}, {name}": _positions(mask, kind)
        for kind, name, mask in [
            ("rademacher", "small", MASKS["small"]),
            ("gaussian_table", "random", MASKS["random"]),
        ]
    }
    | {
        f"rows, {name}, {kind}, {masked}": _rows(width, MASKS[masked], kind)
        for name, width in _WIDTHS.items()
        for kind, masked in [("rademacher", "random"), ("gaussian_table", "small")]
    }
    | {
        "positions, gaussian": _positions(None, "gaussian", (torch.float32, torch.bfloat16)),
        "rows, gaussian": _rows(1031, None, "gaussian", (torch.float32, torch.bfloat16)),
        "nothing": _nothing(),
    }
    | {f"noise, {kind}": _noise(kind) for kind in KINDS}
)


def _build(
    function: str, registers: int, width: int = 4096, mask: Mask | None = None, **given: str
) -> Build:
    def launch() -> None:
        from sft.kernels.triton import displace_at

        weight = torch.empty(1024, width, dtype=torch.bfloat16, device="meta")
        at = torch.empty(2**14 + 3, dtype=torch.int32, device="meta")
        getattr(displace_at, function)(weight, at, *_options(mask, given["kind"]))

    return Build(
        launch,
        registers=dict.fromkeys(("sm_80", "sm_90", "sm_100"), registers),
        wide=False,  # the loop is over draws; see test_displace_builds.py
        contracts=given["kind"] == "gaussian",
    )


BUILDS = {
    f"{function.removeprefix('displace_')}, {kind}": _build(function, registers, kind=kind)
    for function, kind, registers in [
        ("displace_at", "rademacher", 54),
        ("displace_at", "gaussian_table", 54),
        ("displace_at", "gaussian", 64),
        ("displace_rows", "rademacher", 54),
        ("displace_rows", "gaussian_table", 54),
        ("displace_rows", "gaussian", 60),
    ]
} | {
    "at, random": _build("displace_at", 62, kind="rademacher", mask=Random(3, 0.5)),
    "rows, small": _build("displace_rows", 54, kind="rademacher", mask=Magnitude(0.5)),
    "rows, odd": _build("displace_rows", 60, width=4097, kind="rademacher"),
}


def _sample(mask: Mask | None) -> tuple[Any, ...]:
    return _table(6, 10, torch.float32), torch.tensor([5, 0, 3]), *_options(mask, "rademacher")


SAMPLES = {
    "displace_at": lambda: _sample(Random(2**63, 0.5)),
    "displace_rows": lambda: _sample(Magnitude(0.5)),
    "noise_at": lambda: (torch.tensor([[5, 2**40]]), signed(2**63 + 5), 3, "gaussian_table"),
}
