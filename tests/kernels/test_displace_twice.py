"""An update and the perturbation after it: those of two calls, whichever are asked for."""

from __future__ import annotations

import pytest
import torch

from sft.kernels.displace_twice import displace_twice, displace_twice_reference
from sft.kernels.mask import Magnitude, Random
from sft.kernels.noise import KINDS

UPDATE, THEN = [(2**63 + 5, -1e-2), (7, 0.25)], [(7, 1e-3)]
MASKS = {"all": None, "small": Magnitude(0.5), "random": Random(9, 0.3)}
PARAMETERS = [3, 2**32 - 1]


def weights(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in ((41, 130), (7,))]
    return [made[0].t(), made[1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_both_and_each_alone(kind, mask, dtype) -> None:
    options = {"kind": kind, "decays": [0.1] * 2, "masks": [mask] * 2}
    pairs = [
        displace_twice_reference(w, p, UPDATE, THEN, kind=kind, decay=0.1, mask=mask)
        for w, p in zip(weights(dtype), PARAMETERS, strict=True)
    ]
    updated, given = weights(dtype), weights(dtype)
    ahead = displace_twice(given, PARAMETERS, UPDATE, THEN, **options, out=updated)
    alone = displace_twice(given, PARAMETERS, UPDATE, THEN, **options)
    in_place = weights(dtype)
    displace_twice(in_place, PARAMETERS, UPDATE, THEN, **options, ahead=in_place)
    for i, (u, a) in enumerate(pairs):
        assert torch.equal(updated[i], u)
        for found in (ahead, alone, in_place):
            assert torch.equal(found[i], a)
        assert torch.equal(given[i], weights(dtype)[i])


def test_the_weights_may_take_the_update() -> None:
    given = weights()
    ahead = displace_twice(given, PARAMETERS, UPDATE, THEN, out=given)
    for i, (w, p) in enumerate(zip(weights(), PARAMETERS, strict=True)):
        u, a = displace_twice_reference(w, p, UPDATE, THEN)
        assert torch.equal(given[i], u)
        assert torch.equal(ahead[i], a)


def test_the_update_is_rounded_before_it_is_perturbed() -> None:
    """As in two passes: one sum of both would be another number."""
    w = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    draws, then = [(1, 2.0**-9)], [(2, 2.0**-9)]
    (ahead,) = displace_twice([w], [1], draws, then)
    assert torch.equal(ahead, displace_twice_reference(w, 1, draws, then)[1])
    joined = displace_twice([w], [1], [*draws, *then], [])[0]
    assert not torch.equal(ahead, joined)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"out: got .* allowed is shaped like its weight"):
        displace_twice([torch.ones(3)], [1], UPDATE, THEN, out=[torch.ones(4)])
    with pytest.raises(ValueError, match="parameters: got 2, allowed is one for each of 1"):
        displace_twice([torch.ones(3)], [1, 2], UPDATE, THEN)
