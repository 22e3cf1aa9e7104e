"""Facts of SM3, against python loops over the published equations."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch
from torch import nn

from sft.kernels.sm3 import Positions, sm3_step_
from sft.optim.move import move_state
from sft.optim.sm3 import SM3

EPS = 1e-8


def support(o: int, i: int, k: int, seed: int = 0) -> Positions:
    flat = torch.randperm(o * i, generator=torch.manual_seed(seed))[:k].sort().values
    return Positions(flat // i, flat % i, (o, i))


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed))


def sm3_by_hand(
    value: list[float],
    grad: list[float],
    row: list[float],
    col: list[float],
    at: Positions,
    lr: float,
    wd: float,
) -> None:
    """SM3-II of arXiv 1901.11150 over the entries of a support, old maxima kept; in place."""
    rows, cols = at.rows.tolist(), at.cols.tolist()
    covered = [
        min(row[r], col[c]) + g * g for r, c, g in zip(rows, cols, grad, strict=True)
    ]  # from the accumulators before this update
    for j, (r, c) in enumerate(zip(rows, cols, strict=True)):
        row[r] = max(row[r], covered[j])
        col[c] = max(col[c], covered[j])
        value[j] -= lr * grad[j] / math.sqrt(covered[j] + EPS)
        value[j] -= lr * wd * value[j]


@pytest.mark.parametrize(("o", "i", "k"), [(6, 9, 20), (1, 5, 5), (5, 1, 3), (4, 4, 0), (3, 3, 9)])
def test_fact21_sparse_step_equals_loop_and_accumulators_never_decrease(
    o: int, i: int, k: int
) -> None:
    at = support(o, i, k)
    param = nn.Parameter(draw(k, seed=1))
    value, row, col = param.tolist(), [0.0] * o, [0.0] * i
    optimizer = SM3([param], lr=0.1, weight_decay=0.5, positions=lambda _: at)
    for t in range(8):
        if t == 4:  # a reselection: other entries, same accumulators
            at = support(o, i, k, seed=9)
        grad = draw(k, seed=t)
        param.grad = grad.clone()
        before = [a.clone() for a in optimizer.accumulators(param) or ()]
        optimizer.step()
        sm3_by_hand(value, grad.tolist(), row, col, at, lr=0.1, wd=0.5)
        after = optimizer.accumulators(param)
        assert after is not None
        assert all((new >= old).all() for new, old in zip(after, before, strict=False))
        torch.testing.assert_close(after[0], torch.tensor(row), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(after[1], torch.tensor(col), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(param.detach(), torch.tensor(value), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 6), (3, 4, 2)])
def test_dense_step_equals_sm3_with_the_maximum_taken_afresh(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(draw(*shape, seed=1))
    value = param.detach().clone().double()
    sizes = shape or (1,)
    accumulators = [[0.0] * size for size in sizes]
    optimizer = SM3([param], lr=0.1)
    for t in range(6):
        param.grad = draw(*shape, seed=t)
        grad = param.grad.double().reshape(sizes)
        optimizer.step()
        fresh = [[0.0] * size for size in sizes]  # mu'_t = 0, line 4 of SM3-II
        for index in itertools.product(*map(range, sizes)):
            nu = min(acc[j] for acc, j in zip(accumulators, index, strict=True))
            nu += grad[index].item() ** 2
            for acc, j in zip(fresh, index, strict=True):
                acc[j] = max(acc[j], nu)
            value.view(sizes)[index] -= 0.1 * grad[index] / math.sqrt(nu + EPS)
        accumulators = fresh
        for dim, expected in enumerate(accumulators):
            found = optimizer.state[param][f"accumulator_{dim}"]
            torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(param.detach(), value.float(), rtol=1e-6, atol=1e-6)


def test_full_support_equals_dense() -> None:
    dense = nn.Parameter(draw(4, 6, seed=1))
    sparse = nn.Parameter(dense.detach().reshape(-1).clone())
    everywhere = {sparse: support(4, 6, 24)}
    optimizer = SM3([dense, sparse], momentum=0.9, weight_decay=0.1, positions=everywhere.get)
    for t in range(5):
        dense.grad = draw(4, 6, seed=t)
        sparse.grad = dense.grad.reshape(-1).clone()
        optimizer.step()
    assert torch.equal(dense.reshape(-1), sparse)


def test_momentum_is_a_running_mean_of_the_update() -> None:
    value, buffer, row, col = torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1)
    at = Positions(torch.tensor([0]), torch.tensor([0]), (1, 1))
    x = mean = total = 0.0
    for g in (1.0, -2.0, 0.5):
        sm3_step_(
            value,
            torch.tensor([g]),
            (row, col),
            buffer,
            positions=at,
            lr=0.1,
            momentum=0.9,
            eps=EPS,
            weight_decay=0.0,
        )
        total += g * g
        mean = 0.9 * mean + 0.1 * g / math.sqrt(total + EPS)
        x -= 0.1 * mean
        assert value.item() == pytest.approx(x, rel=1e-6)


def test_eps_floors_the_root_inside() -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([1e-6, 0.0])
    SM3([param], lr=1e-3).step()
    assert param[0].item() == pytest.approx(-1e-3 * 1e-6 / 1e-4, rel=1e-4)
    assert param[1].item() == 0


def test_bf16_values_keep_fp32_state_and_follow_fp32_arithmetic() -> None:
    at = support(5, 5, 10)
    low = nn.Parameter(draw(10, seed=1).bfloat16())
    full = low.detach().float()
    row, col = torch.zeros(5), torch.zeros(5)
    optimizer = SM3([low], lr=0.1, positions=lambda _: at)
    for t in range(4):
        low.grad = draw(10, seed=t).bfloat16()
        options = {"lr": 0.1, "eps": EPS, "weight_decay": 0.0}
        sm3_step_(full, low.grad.float(), (row, col), None, positions=at, **options)
        full = full.bfloat16().float()
        optimizer.step()
    assert torch.equal(low.float(), full)
    accumulators = optimizer.accumulators(low)
    assert accumulators is not None
    assert torch.equal(accumulators[0], row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fact32_and_fact34_resumed_equals_uninterrupted(dtype: torch.dtype) -> None:
    source = torch.arange(30).roll(4)
    source[::6] = -1

    def train(
        params: list[nn.Parameter], optimizer: SM3, live: dict[nn.Parameter, Positions], ts: range
    ) -> None:
        for t in ts:
            for p in params:
                p.grad = draw(*p.shape, seed=t).to(dtype)
            optimizer.step()
            if t == 2:
                live[params[0]] = support(8, 8, 30, seed=5)
                move_state(optimizer, params[0], source)

    def fresh() -> tuple[list[nn.Parameter], dict[nn.Parameter, Positions]]:
        params = [nn.Parameter(draw(*s, seed=8).to(dtype)) for s in ((30,), (4, 5), (7,))]
        return params, {params[0]: support(8, 8, 30)}

    options = {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1}
    whole, live = fresh()
    uninterrupted = SM3(whole, positions=live.get, **options)
    train(whole, uninterrupted, live, range(10))

    first, live = fresh()
    stopped = SM3(first, positions=live.get, **options)
    train(first, stopped, live, range(5))
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed_live = {second[0]: live[first[0]]}
    resumed = SM3(second, positions=resumed_live.get)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(second, resumed, resumed_live, range(5, 10))

    for p, q in zip(whole, second, strict=True):
        assert torch.equal(p, q)
        for key, expected in uninterrupted.state[p].items():
            assert resumed.state[q][key].dtype == torch.float32
            assert torch.equal(resumed.state[q][key], expected), key


def test_move_keeps_accumulators_and_resets_momentum_of_grown() -> None:
    at = support(6, 6, 8)
    param = nn.Parameter(draw(8, seed=0))
    optimizer = SM3([param], momentum=0.9, positions=lambda _: at)
    param.grad = draw(8, seed=1)
    optimizer.step()
    momentum = optimizer.state[param]["momentum"].clone()
    before = [a.clone() for a in optimizer.accumulators(param) or ()]
    move_state(optimizer, param, torch.tensor([3, -1, 0, 1, -1, 7, 6, 5]))
    expected = momentum[[3, 0, 0, 1, 0, 7, 6, 5]]
    expected[[1, 4]] = 0
    assert torch.equal(optimizer.state[param]["momentum"], expected)
    after = optimizer.accumulators(param)
    assert after is not None
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))


def test_move_takes_the_accumulator_of_a_vector_without_positions_along() -> None:
    param = nn.Parameter(draw(3, seed=0))
    optimizer = SM3([param])
    param.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    move_state(optimizer, param, torch.tensor([2, -1, 0]))
    assert optimizer.state[param]["accumulator_0"].tolist() == [9.0, 0.0, 1.0]


def test_accumulators_are_none_before_the_first_step_and_for_vectors() -> None:
    vector, matrix = nn.Parameter(draw(3, seed=0)), nn.Parameter(draw(2, 3, seed=0))
    optimizer = SM3([vector, matrix])
    assert optimizer.accumulators(matrix) is None
    move_state(optimizer, vector, torch.tensor([0, -1, 1]))  # never stepped: nothing to do
    for p in (vector, matrix):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.accumulators(vector) is None
    found = optimizer.accumulators(matrix)
    assert found is not None
    assert [a.shape for a in found] == [(2,), (3,)]


def test_bad_options_and_positions_are_named() -> None:
    param = nn.Parameter(draw(3, seed=0))
    for option, value in {"lr": -1, "momentum": 1.0, "eps": 0, "weight_decay": -1}.items():
        with pytest.raises(ValueError, match=f"^{option}: got {value}, allowed is "):
            SM3([param], **{option: value})
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"^positions: got rows \(4,\) and cols \(4,\), allowed"):
        SM3([param], positions=lambda _: support(3, 3, 4)).step()
