"""Facts of optimizer state when a parameter gets shorter along one side."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from sft.optim.adamw import SparseAdamW
from sft.optim.move import move_state
from sft.optim.sm3 import SM3

KEPT = torch.tensor([0, 2, 5])
SHAPES = {"rows": ((6, 4), 0), "columns": ((4, 6), 1), "vector": ((6,), 0)}


def gradients(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def step(param: nn.Parameter, optimizer: Any, grads: list[torch.Tensor]) -> None:
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        optimizer.zero_grad()


def shorten(param: nn.Parameter, optimizer: Any, dim: int, kept: torch.Tensor) -> None:
    param.grad, param.data = None, param.detach().index_select(dim, kept)
    move_state(optimizer, param, kept, dim=dim)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SparseAdamW, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
        (torch.optim.Adam, {"foreach": False}),
        (torch.optim.NAdam, {}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.1}),
    ],
)
def test_s12_survivors_go_on_as_if_they_had_been_alone(shape: str, make: Any, options: Any) -> None:
    (size, dim), grads = SHAPES[shape], gradients(SHAPES[shape][0], 5)
    start = torch.randn(size, generator=torch.manual_seed(0))
    alive = [grad.index_select(dim, KEPT) for grad in grads]
    whole, few = nn.Parameter(start.clone()), nn.Parameter(start.index_select(dim, KEPT))
    one, other = make([whole], **options), make([few], **options)
    step(whole, one, grads[:3])
    step(few, other, alive[:3])
    shorten(whole, one, dim, KEPT)
    assert one.state[whole].keys() == other.state[few].keys()
    for key, value in other.state[few].items():
        mine = one.state[whole][key]
        assert not isinstance(value, torch.Tensor) or torch.equal(mine, value), key
    step(whole, one, alive[3:])
    step(few, other, alive[3:])
    # vectorised tails round otherwise than the body of a loop does
    torch.testing.assert_close(whole, few, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kept", [KEPT, KEPT[:0]])
def test_sm3_keeps_the_accumulators_of_the_other_side(kept: torch.Tensor) -> None:
    (size, dim), grads = SHAPES["columns"], gradients(SHAPES["columns"][0], 3)
    param = nn.Parameter(torch.zeros(size))
    optimizer = SM3([param], momentum=0.9)
    step(param, optimizer, grads)
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    shorten(param, optimizer, dim, kept)
    state = optimizer.state[param]
    assert torch.equal(state["accumulator_0"], before["accumulator_0"])
    assert torch.equal(state["accumulator_1"], before["accumulator_1"][kept])
    assert torch.equal(state["momentum"], before["momentum"][:, kept])
    step(param, optimizer, [grad[:, kept] for grad in grads])


def hf_adafactor(params: Any) -> Any:
    from transformers import Adafactor

    return Adafactor(params, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, hf_adafactor])
@pytest.mark.parametrize("shape", SHAPES)
def test_factored_moments_keep_the_statistics_of_the_other_side(shape: str, make: Any) -> None:
    (size, dim), grads = SHAPES[shape], gradients(SHAPES[shape][0], 3)
    param = nn.Parameter(torch.randn(size, generator=torch.manual_seed(0)))
    optimizer = make([param])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecated calls
        step(param, optimizer, grads)
        before = {k: v for k, v in optimizer.state[param].items() if torch.is_tensor(v)}
        shorten(param, optimizer, dim, KEPT)
        for key, old in before.items():
            value = optimizer.state[param][key]
            side = [axis for axis, n in enumerate(old.shape) if n == 6]
            expected = old.index_select(side[0], KEPT) if side else old
            assert torch.equal(value, expected), key
        step(param, optimizer, [grad.index_select(dim, KEPT) for grad in grads])
    assert param.isfinite().all()


def test_a_grown_row_of_factored_moments_is_refused() -> None:
    param = nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.Adafactor([param])
    step(param, optimizer, gradients((6, 4), 1))
    with pytest.raises(ValueError, match=r"^optimizer: got Adafactor with state 'row_var'"):
        move_state(optimizer, param, torch.tensor([0, 1, 2, 3, 4, -1]))


def test_a_source_beyond_the_old_size_is_refused() -> None:
    param = nn.Parameter(torch.randn(6, 4))
    optimizer = SparseAdamW([param])
    step(param, optimizer, gradients((6, 4), 1))
    with pytest.raises(ValueError, match=r"^source: got torch.int64 outside .* in \[-1, 6\)"):
        param.data = param.detach()[:2].clone()
        move_state(optimizer, param, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"^source: got shape \(1,\), allowed is \(2,\)"):
        move_state(optimizer, param, torch.tensor([0]))


@pytest.mark.parametrize("columns", [3000, 40, 0])
def test_8bit_moments_get_shorter(columns: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from sft.optim.bnb_state import dequantised

    param = nn.Parameter(torch.randn(2, 5000, generator=torch.manual_seed(0)))
    optimizer = bnb.optim.AdamW8bit([param], lr=1e-3)
    step(param, optimizer, gradients((2, 5000), 3))
    state, kept = optimizer.state[param], torch.arange(columns) * 5000 // max(columns, 1)
    old = [dequantised(state[f"state{n}"], state[f"absmax{n}"], state[f"qmap{n}"]) for n in (1, 2)]
    shorten(param, optimizer, 1, kept)
    for n, before in enumerate(old, start=1):
        codes, absmax, code_map = (state[f"{key}{n}"] for key in ("state", "absmax", "qmap"))
        assert codes.shape == param.shape and absmax.shape == (-(-2 * columns // 256),)
        gap = (code_map[1:] - code_map[:-1]).max() / 2
        bound = absmax.repeat_interleave(256)[: 2 * columns].view(2, columns) * gap + 1e-7
        assert ((dequantised(codes, absmax, code_map) - before[:, kept]).abs() <= bound).all()
    if columns:
        step(param, optimizer, gradients((2, columns), 2))
        assert param.isfinite().all()
