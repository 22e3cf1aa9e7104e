"""Facts of moving optimizer state along with a reselection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sft.optim.adamw import SparseAdamW
from sft.optim.move import move_state, moved

SOURCE = torch.tensor([4, -1, 0, 5, -1, 2])  # six slots; two grown, one and three dropped


def stepped(make: Any, k: int = 6, dtype: torch.dtype = torch.float32, updates: int = 3, **o: Any):
    """Return a parameter and its optimizer after a few updates."""
    param = nn.Parameter(torch.randn(k, generator=torch.manual_seed(0)).to(dtype))
    optimizer = make([param], **o)
    for t in range(updates):
        param.grad = torch.randn(k, generator=torch.manual_seed(t)).to(dtype)
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("shape", [(6,), (6, 4), (2, 6, 3)])
@pytest.mark.parametrize("source", [SOURCE, SOURCE[:4], torch.tensor([5, 0]), SOURCE[:0]])
def test_moved_equals_loop(shape: tuple[int, ...], source: torch.Tensor) -> None:
    dim = shape.index(6)
    old = torch.randn(shape, generator=torch.manual_seed(0))
    size = [len(source) if axis == dim else n for axis, n in enumerate(shape)]
    grown = torch.randn(size, generator=torch.manual_seed(1))
    found, zeros = moved(old, source, grown, dim), moved(old, source, dim=dim)
    assert list(found.shape) == list(zeros.shape) == size
    for j, s in enumerate(source.tolist()):
        expected = grown.select(dim, j) if s < 0 else old.select(dim, s)
        assert torch.equal(found.select(dim, j), expected)
        assert torch.equal(zeros.select(dim, j), expected * (s >= 0))


def test_moved_of_nothing() -> None:
    empty = torch.zeros(0, 3)
    assert moved(empty, SOURCE[:0]).shape == (0, 3)
    assert moved(empty, torch.tensor([-1, -1])).tolist() == [[0] * 3] * 2
    with pytest.raises(ValueError, match=r"^source: got torch.int64 outside .* in \[-1, 0\)"):
        moved(empty, torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fact13_kept_entries_keep_their_state_bit_for_bit(dtype: torch.dtype) -> None:
    param, optimizer = stepped(SparseAdamW, dtype=dtype)
    # Distinct ages, so that a slot that kept its place by mistake is seen.
    optimizer.state[param]["age"] += torch.arange(6, dtype=torch.int32)
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    seeds = torch.full((6,), 9.0)
    move_state(optimizer, param, SOURCE, mean_grad=seeds, mean_square=seeds, updates=5)
    for key, value in optimizer.state[param].items():
        assert value.dtype == before[key].dtype
        for slot, old_slot in enumerate(SOURCE.tolist()):
            if old_slot >= 0:
                assert value[slot] == before[key][old_slot], (key, slot)
    assert optimizer.state[param]["age"][[1, 4]].tolist() == [5, 5]


def test_fact3_shapes_stay_over_many_rounds() -> None:
    param, optimizer = stepped(SparseAdamW)
    for t in range(20):
        source = torch.randperm(6, generator=torch.manual_seed(t))
        source[t % 6] = -1
        move_state(optimizer, param, source, updates=t % 4)
        param.grad = torch.ones(6)
        optimizer.step()
        assert all(value.shape == (6,) for value in optimizer.state[param].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 8, 128])
@pytest.mark.parametrize("window", [1, 5])
def test_fact17_first_estimate_of_a_grown_entry_is_unbiased(
    dtype: torch.dtype, micro_batches: int, window: int
) -> None:
    """Eq. of arXiv 2401.16405 section 3.2 with per-update seeds: m_hat = g, v_hat = g^2."""
    g = torch.tensor([0.5, -3.0, 2.0**-10, 1.5, -0.25, 1.0])  # exact in bf16
    param, optimizer = stepped(SparseAdamW, dtype=dtype)
    total = torch.zeros(6)
    total_square = torch.zeros(6)
    for _ in range(window):
        update = sum((g / micro_batches).to(dtype).float() for _ in range(micro_batches))
        total += update
        total_square += update**2
    mean, square = total / window, total_square / window
    source = torch.full((6,), -1)
    move_state(optimizer, param, source, mean_grad=mean, mean_square=square, updates=window)
    param.grad = g.to(dtype)
    optimizer.step()
    state, t = optimizer.state[param], window + 1
    assert state["age"].tolist() == [t] * 6
    torch.testing.assert_close(state["exp_avg"] / (1 - 0.9**t), g, rtol=1e-5, atol=0)
    torch.testing.assert_close(state["exp_avg_sq"] / (1 - 0.999**t), g**2, rtol=1e-5, atol=0)


def test_defect3_first_update_of_a_grown_entry_is_one_learning_rate() -> None:
    param, optimizer = stepped(SparseAdamW, lr=0.25)
    seeds = {"mean_grad": torch.full((6,), 2.0), "mean_square": torch.full((6,), 4.0)}
    move_state(optimizer, param, torch.full((6,), -1), **seeds, updates=1)
    before = param.detach().clone()
    param.grad = torch.full((6,), 2.0)
    optimizer.step()
    torch.testing.assert_close(before - param.detach(), torch.full((6,), 0.25))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam])
def test_stock_adam_is_seeded_for_its_own_step(make: Any, amsgrad: bool) -> None:
    options = {} if make is torch.optim.NAdam else {"amsgrad": amsgrad}
    param, optimizer = stepped(make, **options)
    before = {k: v.clone() for k, v in optimizer.state[param].items()}
    g = torch.tensor([0.0, 0.5, 0.0, 0.0, -3.0, 0.0])
    move_state(optimizer, param, SOURCE, mean_grad=g, mean_square=g**2, updates=2)
    state = optimizer.state[param]
    assert state["step"] == before["step"]
    kept = SOURCE >= 0
    for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if "amsgrad" in options else [])):
        if key in before:
            assert torch.equal(state[key][kept], before[key][SOURCE[kept]]), key
    param.grad = g.clone()
    optimizer.step()
    grown, t = ~kept, 4
    betas = {"exp_avg": 0.9, "exp_avg_sq": 0.999}
    for (key, beta), truth in zip(betas.items(), (g, g**2), strict=True):
        estimate = state[key][grown] / (1 - beta**t)
        torch.testing.assert_close(estimate, truth[grown], rtol=1e-5, atol=0, msg=key)


def test_moments_without_correction_start_at_the_mean() -> None:
    param, optimizer = stepped(torch.optim.RMSprop, momentum=0.9)
    square = torch.full((6,), 0.25)
    move_state(optimizer, param, SOURCE, mean_square=square)
    assert optimizer.state[param]["square_avg"][[1, 4]].tolist() == [0.25, 0.25]
    assert optimizer.state[param]["momentum_buffer"][[1, 4]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_stock_state_moves_by_index_and_grown_start_at_zero(make: Any, options: Any) -> None:
    param, optimizer = stepped(make, **options)
    before = {k: v.clone() for k, v in optimizer.state[param].items() if v.shape == (6,)}
    assert before
    move_state(optimizer, param, SOURCE)
    for key, old in before.items():
        expected = old[SOURCE.clamp(min=0)] * (SOURCE >= 0)
        assert torch.equal(optimizer.state[param][key], expected), key


@pytest.mark.parametrize("make", [SparseAdamW, torch.optim.AdamW])
def test_defect14_a_parameter_never_stepped_is_no_error(make: Any) -> None:
    param, _ = stepped(make)
    optimizer = make([param])
    move_state(optimizer, param, SOURCE, mean_grad=torch.ones(6), updates=5)
    assert not optimizer.state


def test_state_moves_behind_the_wrapper_of_accelerate() -> None:
    param, optimizer = stepped(SparseAdamW)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert wrapped is not optimizer
    before = optimizer.state[param]["exp_avg"].clone()
    move_state(wrapped, param, SOURCE, updates=2)
    assert optimizer.state[param]["exp_avg"][0] == before[4]
    assert optimizer.state[param]["age"].tolist() == [3, 2, 3, 3, 2, 3]


def test_what_does_not_fit_is_refused() -> None:
    param, optimizer = stepped(SparseAdamW)
    with pytest.raises(ValueError, match=r"^source: got shape \(2,\), allowed is \(6,\)"):
        move_state(optimizer, param, SOURCE[:2])
    with pytest.raises(ValueError, match=r"^mean_grad: got shape \(3,\), allowed is \(6,\)"):
        move_state(optimizer, param, SOURCE, mean_grad=torch.ones(3))
    for bad in (SOURCE + 1, SOURCE - 1, SOURCE.int()):
        with pytest.raises(ValueError, match=r"^source: got torch.int.*allowed is int64 in"):
            move_state(optimizer, param, bad)
    with pytest.raises(ValueError, match=r"^updates: got -1"):
        move_state(optimizer, param, SOURCE, updates=-1)


def test_state_of_an_unknown_layout_is_refused() -> None:
    param, optimizer = stepped(torch.optim.AdamW)
    optimizer.state[param]["factor"] = torch.ones(6, 2)
    with pytest.raises(ValueError, match=r"^optimizer: got AdamW with state 'factor' of shape"):
        move_state(optimizer, param, SOURCE)
