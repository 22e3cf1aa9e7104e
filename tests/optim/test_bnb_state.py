"""Facts of moving the 8-bit states of bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sft.optim.bnb_state import dequantised, requantise_
from sft.optim.move import move_state

bnb = pytest.importorskip("bitsandbytes")

K = 5000  # not a multiple of the block of 256; above bitsandbytes' 8-bit threshold of 4096


def stepped(make: Any, updates: int = 3, k: int = K, **options: Any) -> tuple[nn.Parameter, Any]:
    param = nn.Parameter(torch.randn(k, generator=torch.manual_seed(0)))
    optimizer = make([param], lr=1e-3, **options)
    for t in range(updates):
        param.grad = torch.randn(k, generator=torch.manual_seed(t))
        optimizer.step()
    return param, optimizer


def moments(state: dict[str, Any], number: int) -> torch.Tensor:
    codes, books = state[f"state{number}"], (state[f"absmax{number}"], state[f"qmap{number}"])
    return dequantised(codes, *books)


@pytest.mark.parametrize("signed", [True, False])
def test_dequantised_and_requantised_equal_bitsandbytes(signed: bool) -> None:
    functional = bnb.functional
    code_map = functional.create_dynamic_map(signed=signed)
    values = torch.randn(K, generator=torch.manual_seed(0))
    values = values if signed else values.square()
    codes = torch.zeros(K, dtype=torch.uint8)
    absmax = torch.zeros(-(-K // 256))
    requantise_(codes, absmax, code_map, values)
    theirs, quant_state = functional.quantize_blockwise(values, code=code_map, blocksize=256)
    assert torch.equal(absmax, quant_state.absmax)
    # Halfway values may round either way: compare what the codes say, not the codes.
    step = (code_map[1:] - code_map[:-1]).max() * absmax.repeat_interleave(256)[:K]
    ours_error = (dequantised(codes, absmax, code_map) - values).abs()
    theirs_error = (functional.dequantize_blockwise(theirs, quant_state) - values).abs()
    assert (ours_error <= theirs_error + 1e-6).all()
    assert (ours_error <= step / 2 + 1e-6).all()
    assert torch.equal(
        dequantised(theirs, quant_state.absmax, code_map),
        functional.dequantize_blockwise(theirs, quant_state),
    )


def test_dequantised_equals_loop() -> None:
    code_map = torch.linspace(-1, 1, 256)
    codes = torch.randint(0, 256, (300,), generator=torch.manual_seed(0)).to(torch.uint8)
    absmax = torch.tensor([2.0, 0.5])
    expected = [
        code_map[c].item() * (2.0 if j < 256 else 0.5) for j, c in enumerate(codes.tolist())
    ]
    assert dequantised(codes, absmax, code_map).tolist() == expected


@pytest.mark.parametrize("make", [bnb.optim.AdamW8bit, bnb.optim.Adam8bit])
def test_nothing_reselected_leaves_every_bit(make: Any) -> None:
    param, optimizer = stepped(make)
    assert optimizer.state[param]["state1"].dtype == torch.uint8
    before = {k: v.clone() for k, v in optimizer.state[param].items() if torch.is_tensor(v)}
    move_state(optimizer, param, torch.arange(K))
    for key, old in before.items():
        assert torch.equal(optimizer.state[param][key], old), key


def test_fact13_kept_entries_keep_their_moments_to_eight_bits() -> None:
    param, optimizer = stepped(bnb.optim.AdamW8bit)
    state = optimizer.state[param]
    source = torch.randperm(K, generator=torch.manual_seed(5))
    source[::10] = -1
    kept = source >= 0
    old = [moments(state, number) for number in (1, 2)]
    move_state(optimizer, param, source)
    for number, before in enumerate(old, start=1):
        after, largest = moments(state, number), state[f"absmax{number}"]
        gap = (state[f"qmap{number}"][1:] - state[f"qmap{number}"][:-1]).max()
        bound = largest.repeat_interleave(256)[:K] * gap / 2 + 1e-7
        error = (after - before[source.clamp(min=0)]).abs()
        assert (error <= bound)[kept].all()
        assert (after[~kept] == 0).all()
        assert state[f"state{number}"].dtype == torch.uint8
    optimizer.step()
    assert param.isfinite().all()


def test_fact17_grown_entries_of_8bit_adam_are_seeded() -> None:
    param, optimizer = stepped(bnb.optim.AdamW8bit)
    g = torch.empty(K).uniform_(0.5, 1.0, generator=torch.manual_seed(7))
    source = torch.full((K,), -1)
    move_state(optimizer, param, source, mean_grad=g, mean_square=g**2, updates=5)
    param.grad = g.clone()
    optimizer.step()
    state = optimizer.state[param]
    # The optimizer's own step count, 4 after this update, corrects every entry.
    torch.testing.assert_close(moments(state, 1) / (1 - 0.9**4), g, rtol=0.05, atol=0)
    torch.testing.assert_close(moments(state, 2) / (1 - 0.999**4), g**2, rtol=0.05, atol=0)


def test_small_parameters_keep_fp32_state_that_moves_bit_for_bit() -> None:
    param, optimizer = stepped(bnb.optim.AdamW8bit, k=6)
    state = optimizer.state[param]
    assert state["state1"].dtype == torch.float32
    before = state["state1"].clone()
    source = torch.tensor([4, -1, 0, 5, -1, 2])
    move_state(optimizer, param, source, mean_grad=torch.ones(6), mean_square=torch.ones(6))
    assert torch.equal(state["state1"][source >= 0], before[source[source >= 0]])
    expected = torch.full((2,), 1 - 0.9**3)
    torch.testing.assert_close(state["state1"][source < 0], expected)


def test_lion_is_not_taken_for_adam() -> None:
    param, optimizer = stepped(bnb.optim.Lion8bit)
    move_state(optimizer, param, torch.full((K,), -1), mean_grad=torch.ones(K))
    assert (moments(optimizer.state[param], 1) == 0).all()


def test_stacked_moments_of_ademamix_are_refused() -> None:
    param, optimizer = stepped(bnb.optim.AdEMAMix8bit)
    with pytest.raises(ValueError, match=r"^optimizer: got AdEMAMix8bit with state 'state1'"):
        move_state(optimizer, param, torch.arange(K))
