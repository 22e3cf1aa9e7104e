"""Cases of `kernels/triton/displace.py`: the bits are those of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from device_cases.base import HALVES, Build, Case
from torch import Tensor

from sft.kernels.displace import displace_reference
from sft.kernels.displace_twice import displace_twice_reference
from sft.kernels.mask import Magnitude, Mask, Random, coded
from sft.kernels.noise import KINDS, TILE, noise, noise_reference, signed

DTYPES = (torch.float32, *HALVES, torch.float64)
DRAWS = [(5, 1e-2), (2**63 + 6, -0.3), (8, 0.0), (2**64 - 1, 2.0)]
THEN = [(2**63 + 9, 1e-3), (5, -0.02)]
PARAMETER = 2**32 - 7
MASKS: dict[str, Mask | None] = {
    "all": None,
    "small": Magnitude(0.1),
    "random": Random(2**63 + 9, 0.3),
}


def weights(dtype: torch.dtype) -> list[Tensor]:
    """Of odd lengths, of one weight, of whole tiles, transposed, empty; with both zeros."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 1667), (), (2 * TILE,), (77, 60), (0, 4)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[0][0, :4] = torch.tensor([0.0, -0.0, 0.1, -0.1])
    made[3] = made[3].t()
    return made


def split(draws: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [signed(key) for key, _ in draws], [c for _, c in draws]


def _launch(
    given: list[Tensor],
    out: list[Tensor],
    *,
    draws: Sequence[tuple[int, float]] = DRAWS,
    kind: str = "rademacher",
    decays: Sequence[float] = (0.0,),
    mask: Mask | None = None,
    ahead: list[Tensor] | None = None,
) -> None:
    """Call a launcher, past the op, with as many decays in turn as are given."""
    from sft.kernels.triton.displace import displace_, displace_twice_

    count = len(given)
    parameters = [PARAMETER - i for i in range(count)]
    numbers = [decays[i % len(decays)] for i in range(count)], *coded([mask] * count)
    if ahead is None:
        displace_(given, out, parameters, [0] * count, *numbers, *split(draws), kind)
    else:
        displace_twice_(given, out, ahead, parameters, *numbers, *split(draws), *split(THEN), kind)


def _oracle(
    given: list[Tensor],
    *,
    draws: Sequence[tuple[int, float]] = DRAWS,
    kind: str = "rademacher",
    decays: Sequence[float] = (0.0,),
    mask: Mask | None = None,
) -> list[Tensor]:
    return [
        displace_reference(
            w, PARAMETER - i, draws, kind=kind, decay=decays[i % len(decays)], mask=mask
        )
        for i, w in enumerate(given)
    ]


def _to_new(dtypes: Sequence[torch.dtype] = DTYPES, **options: Any) -> Case:
    """Write to other tensors, of the same strides."""

    def run(given: list[Tensor]) -> list[Tensor]:
        out = [torch.empty_like(w) for w in given]
        _launch(given, out, **options)
        return out

    return Case(
        make=lambda dtype: (weights(dtype),),
        run=run,
        expected=lambda given: _oracle(given, **options),
        dtypes=dtypes,
        tolerance=_close if options.get("kind") == "gaussian" else None,
    )


def _in_place(**options: Any) -> Case:
    def expected(given: list[Tensor]) -> None:
        for w, moved in zip(given, _oracle(given, **options), strict=True):
            w.copy_(moved)

    return Case(
        make=lambda dtype: (weights(dtype),),
        run=lambda given: _launch(given, given, **options),
        expected=expected,
        dtypes=DTYPES,
        mutates=(0,),
    )


def _twice(keep: bool, **options: Any) -> Case:
    """An update and the perturbation after it: both, or the perturbed weights alone."""

    def run(given: list[Tensor]) -> list[Tensor]:
        ahead = [torch.empty_like(w) for w in given]
        out = [torch.empty_like(w) for w in given] if keep else []
        _launch(given, out, ahead=ahead, **options)
        return [*out, *ahead]

    def expected(given: list[Tensor]) -> list[Tensor]:
        pairs = [
            displace_twice_reference(
                w, PARAMETER - i, DRAWS, THEN, kind=options["kind"],
                decay=options["decays"][0], mask=options["mask"],
            )
            for i, w in enumerate(given)
        ]  # fmt: skip
        return [*(u for u, _ in pairs if keep), *(a for _, a in pairs)]

    return Case(make=lambda dtype: (weights(dtype),), run=run, expected=expected, dtypes=DTYPES)


def _noise(kind: str, start: int, numel: int = 5003) -> Case:
    """Of any part, also where indices and counters pass 32 bits."""

    def run(out: Tensor) -> None:
        from sft.kernels.triton.displace import noise_

        noise_(out, signed(2**63 + 5), PARAMETER, start, kind)

    def expected(out: Tensor) -> None:
        z = noise(2**63 + 5, PARAMETER, numel, kind=kind, start=start)
        for i in (0, numel // 2, numel - 1):  # past what makes it on the CPU
            exact = noise_reference(2**63 + 5, PARAMETER, start + i, kind=kind)
            assert abs(z[i].item() - exact) < 2e-6
        out.copy_(z)

    return Case(
        make=lambda dtype: (torch.full((numel,), torch.nan, dtype=dtype),),
        run=run,
        expected=expected,
        dtypes=(torch.float32,),
        tolerance=_close if kind == "gaussian" else None,
        mutates=(0,),
        stores_once=False,  # zeroed first
    )


def _close(dtype: torch.dtype) -> tuple[float, float]:
    """Logarithm, sine and cosine are each library's own."""
    return {torch.bfloat16: (1.6e-2, 1e-5), torch.float16: (1e-3, 1e-4)}.get(dtype, (1e-5, 1e-4))


def _kept_bits() -> Case:
    """What the mask keeps is not rewritten, not even a NaN."""

    def run(given: Tensor) -> Tensor:
        out = torch.empty_like(given)
        with np.errstate(invalid="ignore"):  # of the interpreter
            _launch([given], [out], mask=Magnitude(1.0))
        return out

    return Case(
        make=lambda dtype: (torch.full((TILE,), 0x7F85, dtype=torch.int16).view(dtype),),
        run=run,
        expected=lambda given: given,
        dtypes=(torch.bfloat16,),
    )


def _at_the_threshold() -> Case:
    """0.1 lies between two numbers of each dtype; magnitudes up to it move."""

    def make(dtype: torch.dtype) -> tuple[Tensor]:
        near = (0.1 * (1 + torch.finfo(dtype).eps * torch.arange(-2, 3).double())).to(dtype)
        return (torch.cat([near, -near]),)

    def run(near: Tensor) -> Tensor:
        out = torch.empty_like(near)
        _launch([near], [out], draws=[(1, 1.0)], mask=Magnitude(0.1))
        return out != near

    def expected(near: Tensor) -> Tensor:
        chosen = near.double().abs() <= 0.1
        assert 0 < chosen.sum() < len(near)
        return chosen

    return Case(make=make, run=run, expected=expected, dtypes=DTYPES)


def _parts() -> Case:
    """Parts of a parameter, which start within tiles."""
    starts = [0, 1, TILE, 2 * TILE + 77]
    stops = [*starts[1:], 3 * TILE]

    def run(whole: Tensor) -> Tensor:
        from sft.kernels.triton.displace import displace_

        out = torch.empty_like(whole)
        parts = [[t[a:b] for a, b in zip(starts, stops, strict=True)] for t in (whole, out)]
        numbers = [PARAMETER] * 4, starts, [0.1] * 4, *coded([Random(2, 0.5)] * 4)
        displace_(*parts, *numbers, *split(DRAWS), "rademacher")
        return out

    def expected(whole: Tensor) -> Tensor:
        return displace_reference(whole, PARAMETER, DRAWS, decay=0.1, mask=Random(2, 0.5))

    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(3 * TILE, generator=generator)
    return Case(make=lambda dtype: (whole.to(dtype),), run=run, expected=expected)


_EXACT = ("rademacher", "gaussian_table")
CASES = (
    {
        f"{kind}, {name}": _to_new(kind=kind, mask=mask, decays=(0.1, 0.0))
        for kind in _EXACT
        for name, mask in MASKS.items()
    }
    | {
        f"{kind} in place, {name}": _in_place(kind=kind, mask=MASKS[name], decays=(0.1,))
        for kind, name in [("rademacher", "small"), ("gaussian_table", "random")]
    }
    | {
        f"{count} draws, decay {decay}": _to_new(HALVES[:1], draws=draws, decays=(decay,))
        for count, draws in {"no": [], "vain": [(5, 0.0)], "one": [(5, 1e-3)]}.items()
        for decay in (0.0, 0.3)
    }
    | {"gaussian": _to_new(kind="gaussian", decays=(0.1,))}
    | {
        f"twice, {kind}, {name}, {'both' if keep else 'ahead'}": _twice(
            keep, kind=kind, mask=mask, decays=(0.1,)
        )
        for kind, name, mask, keep in [
            ("rademacher", "all", None, True),
            ("rademacher", "small", Magnitude(0.1), True),
            ("gaussian_table", "random", Random(3, 0.4), False),
        ]
    }
    | {
        f"noise, {kind} from {start}": _noise(kind, start)
        for kind in KINDS
        for start in (0, 1, 4095, 10_001, 2**31 - 5, 2**43 + 3)
    }
    | {"kept bits": _kept_bits(), "threshold": _at_the_threshold(), "parts": _parts()}
)


def _build(
    dtype: torch.dtype, registers: int, twice: bool = False, turned: bool = False, **options: Any
) -> Build:
    def launch() -> None:
        w = [torch.empty(2**14 + 3, dtype=dtype), torch.empty(2**12, dtype=dtype)]
        if turned:
            w = [torch.empty(2**8, 2**6, dtype=dtype, device="meta").t()]
        _launch(w, w, ahead=[torch.empty_like(t) for t in w] if twice else None, **options)

    return Build(
        launch,
        registers=dict.fromkeys(("sm_80", "sm_90", "sm_100"), registers),
        wide=False,  # the loop is over draws; see test_displace_builds.py
        contracts=options.get("kind") == "gaussian",
    )


BUILDS = {
    "rademacher": _build(torch.bfloat16, 92, kind="rademacher"),
    "rademacher, masked at random": _build(
        torch.bfloat16, 96, kind="rademacher", mask=Random(3, 0.5)
    ),
    "rademacher, masked by magnitude": _build(
        torch.bfloat16, 92, kind="rademacher", mask=Magnitude(0.5)
    ),
    "rademacher, float32": _build(torch.float32, 116, kind="rademacher"),
    "rademacher, twice": _build(torch.bfloat16, 118, twice=True, kind="rademacher"),
    "rademacher, transposed": _build(torch.bfloat16, 92, turned=True, kind="rademacher"),
    "gaussian_table": _build(torch.bfloat16, 84, kind="gaussian_table"),
    "gaussian": _build(torch.bfloat16, 70, kind="gaussian"),
    "gaussian, twice, masked": _build(
        torch.bfloat16, 140, twice=True, kind="gaussian", mask=Random(3, 0.5)
    ),
    "gaussian, twice, small": _build(
        torch.float16, 140, twice=True, kind="gaussian", mask=Magnitude(0.5)
    ),
    "gaussian, float64": _build(torch.float64, 106, kind="gaussian"),
}


def _sample(twice: bool) -> tuple[Any, ...]:
    given = [torch.ones(3, 5), torch.ones(7)]
    out = [[torch.zeros_like(w) for w in given] for _ in range(1 + twice)]
    numbers = [[1, PARAMETER], [0, 3], [0.0, 0.1], *coded([None, Random(2**63, 0.5)])]
    if twice:
        del numbers[1]
    draws = [*split(DRAWS), *split(THEN)] if twice else split(DRAWS)
    return (given, *out, *numbers, *draws, "rademacher")


SAMPLES = {
    "displace_": lambda: _sample(False),
    "displace_twice_": lambda: _sample(True),
    "noise_": lambda: (torch.empty(7), 5, 3, 4094, "gaussian_table"),
}
