"""Facts of masks: what moves, what never does, and what is held between steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sft.kernels.mask import Magnitude, Random, mask_of
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.trained import trained_set

SEED = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("mask", ["magnitude", "random"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_m1_unmasked_weights_keep_their_bits(
    zo: Any, mask: str, rule: str, dtype: torch.dtype
) -> None:
    """Decay included, and m3: the masks only ever shrink."""
    optimizer = zo.masked(dtype, 0.75, mask=mask, update=rule)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    start = [t.parameter.detach().clone() for t in optimizer.trained]
    masks = [mask_of(t.parameter, t.id, t.mask) for t in optimizer.trained if t.mask]
    for gradient in (0.5, -0.25, 0.75, 0.5, -0.5, 0.5):
        former = [m.clone() for m in masks]
        zo.run(optimizer, [[gradient]])
        masks = [mask_of(t.parameter, t.id, t.mask) for t in optimizer.trained if t.mask]
        assert not any((now & ~before).any() for now, before in zip(masks, former, strict=True))
    for t, w in zip(optimizer.trained, start, strict=True):
        assert t.mask is not None
        free = mask_of(w, t.id, t.mask)
        assert zo.same([t.parameter[~free]], [w[~free]])
        assert float((t.parameter != w)[free].float().mean()) > 0.9


def test_m3_a_weight_that_outgrows_the_threshold_is_frozen_for_good(zo: Any) -> None:
    parameters = zo.weights((64, 64))
    optimizer = zo.build(parameters, lr=0.01, mask=Magnitude(0.01))
    out = torch.zeros(64, 64, dtype=torch.bool)
    for update in range(20):
        before = parameters[0].clone()
        zo.run(optimizer, [[(-1.0) ** update]])
        assert zo.same([parameters[0][out]], [before[out]])
        out |= parameters[0].abs() > 0.01
    assert float((out & (parameters[0].abs() < 0.02)).float().mean()) > 0.3


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_m4_a_mask_of_everything_is_no_mask_bit_for_bit(zo: Any, rule: str) -> None:
    plain, all_of_it, random = (zo.weights((50, 90)) for _ in range(3))
    for parameters, mask in ((plain, None), (all_of_it, Magnitude(1e9)), (random, Random(3, 1.0))):
        zo.run(zo.build(parameters, mask=mask, update=rule), [[0.5], [0.25]])
    assert zo.same(plain, all_of_it) and zo.same(plain, random)


def test_m4_sparsity_0_has_no_mask_and_08_trains_a_fifth(zo: Any) -> None:
    assert [t.mask for t in zo.masked(torch.float32, 0.0).trained] == [None, None]
    optimizer = zo.masked(torch.float32, 0.8)
    start = optimizer.trained[0].parameter.detach().clone()
    zo.run(optimizer, [[0.5]])
    assert float((optimizer.trained[0].parameter != start).float().mean()) == pytest.approx(
        0.2, abs=0.005
    )


def test_m4_ties_that_are_trained_as_well_are_reported(caplog: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    random = nn.Parameter(torch.randn(5000, generator=generator))
    named = [("random", random), ("norm", nn.Parameter(torch.ones(40)))]
    trained_set(named, ZerothOrderConfig(sparsity=0.75), SEED)
    assert "of 1 tensors more than 25% is trained" in caplog.text
    assert caplog.text.rstrip().endswith("threshold: norm")
    caplog.clear()
    trained_set(named[:1], ZerothOrderConfig(sparsity=0.75), SEED)
    trained_set(named, ZerothOrderConfig(sparsity=0.75, mask="random"), SEED)
    assert not caplog.text


def test_m6_between_steps_one_number_a_tensor_is_held(zo: Any) -> None:
    optimizer = zo.masked(torch.float32, 0.75)
    zo.run(optimizer, [[0.5]])
    held = [v for v in vars(optimizer).values() if isinstance(v, Tensor)]
    assert held == [] and not optimizer.state
    saved = optimizer.state_dict()["zeroth_order"]
    assert sum(t.numel() * t.element_size() for t in saved["log"].values()) == 4 + 8 + 4 + 4
    assert all(isinstance(t.mask, Magnitude) for t in optimizer.trained)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_without_an_order_are_refused_by_name(value: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0, value, value]))
    with pytest.raises(ValueError, match=r"model: a.weight holds weights that are not finite"):
        trained_set([("a.weight", weight)], ZerothOrderConfig(sparsity=0.5), 0)
    assert trained_set([("a.weight", weight)], ZerothOrderConfig(), 0)


def test_weights_of_8_bits_are_refused_by_name() -> None:
    weight = nn.Parameter(torch.ones(3).to(torch.float8_e5m2))
    with pytest.raises(
        ValueError, match=r"model: a.weight is float8_e5m2, allowed are floats of 16"
    ):
        trained_set([("a.weight", weight)], ZerothOrderConfig(), 0)


def test_a_random_share_that_16_bits_do_not_hold_is_refused_by_its_key() -> None:
    ZerothOrderConfig(sparsity=1 - 1e-5, mask="random")
    with pytest.raises(ValueError, match=r"sparsity: got 0.999999, allowed is up to 1 - 2"):
        ZerothOrderConfig(sparsity=0.999999, mask="random")
