"""Facts of SparseAdamW, against python loops over the published equations."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sft.kernels.sparse_adamw import sparse_adamw_step_
from sft.optim.adamw import SparseAdamW
from sft.optim.move import move_state

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.manual_seed(seed)).to(dtype))


def give_grads(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("sizes", [[2500] * 30, [0, 1, 7, 40_000, 3]])
def test_fact22_uniform_age_equals_torch_adamw(sizes: list[int]) -> None:
    ours = [parameter(k, seed=k) for k in sizes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    sparse = SparseAdamW(ours, **OPTIONS)
    dense = torch.optim.AdamW(theirs, fused=False, **OPTIONS)
    for seed in range(20):
        give_grads(ours, seed)
        give_grads(theirs, seed)
        sparse.step()
        dense.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        moments = [(sparse.state[p][key], dense.state[q][key]) for key in ("exp_avg", "exp_avg_sq")]
        for mine, other in moments:
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_any_layout_equals_torch_adamw() -> None:
    def layouts() -> list[nn.Parameter]:
        scalar, matrix, turned = parameter(), parameter(5, 7), nn.Parameter(parameter(6, 4).T)
        return [scalar, matrix, turned, nn.Parameter(parameter(9, dtype=torch.float64))]

    ours, theirs = layouts(), layouts()
    sparse, dense = SparseAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, fused=False, **OPTIONS)
    for seed in range(5):
        give_grads(ours, seed)
        give_grads(theirs, seed)
        sparse.step()
        dense.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert {s.dtype for s in sparse.state[p].values()} == {torch.int32, torch.float32}
        assert all(s.shape == p.shape for s in sparse.state[p].values())


def test_together_equals_alone_bit_for_bit() -> None:
    sizes = [1, 3, 17, 20_000, 30_000, 33_000, 70_001]
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    pairs = [(k, dtype) for k in sizes for dtype in dtypes]
    together, alone = ([parameter(k, dtype=d, seed=k) for k, d in pairs] for _ in range(2))
    one = SparseAdamW(together, **OPTIONS)
    many = [SparseAdamW([p], **OPTIONS) for p in alone]
    for seed in range(3):
        give_grads(together, seed)
        give_grads(alone, seed)
        one.step()
        for optimizer in many:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        assert torch.equal(p, q), f"{p.numel()} entries of {p.dtype}"


def test_fact23_zero_gradient_shrinks_towards_the_pretrained_weights() -> None:
    delta = parameter(100)
    before = delta.detach().clone()
    optimizer = SparseAdamW([delta], lr=1e-5, weight_decay=30)
    delta.grad = torch.zeros(100)
    optimizer.step()
    torch.testing.assert_close(delta.detach().abs(), before.abs() * (1 - 3e-4), rtol=1e-6, atol=0)


def test_fact24_decay_of_fp32_values_lasts_a_thousand_updates() -> None:
    delta = nn.Parameter(torch.tensor([1e-3, -5e-3, 1.0]))
    before = delta.detach().clone()
    optimizer = SparseAdamW([delta], lr=1e-5, weight_decay=30)
    for _ in range(1000):
        delta.grad = torch.zeros(3)
        optimizer.step()
    torch.testing.assert_close(delta.detach(), before * (1 - 3e-4) ** 1000, rtol=1e-4, atol=0)


def test_decay_of_bf16_values_rounds_to_nothing_as_documented() -> None:
    delta = nn.Parameter(torch.tensor([1e-3, -5e-3, 1.0], dtype=torch.bfloat16))
    before = delta.detach().clone()
    optimizer = SparseAdamW([delta], lr=1e-5, weight_decay=30)
    delta.grad = torch.zeros_like(delta)
    optimizer.step()
    assert torch.equal(delta, before)


def test_defect5_age_advances_for_bf16_values() -> None:
    delta = parameter(4, dtype=torch.bfloat16)
    optimizer = SparseAdamW([delta])
    for seed in range(300):  # bf16 counts to 256
        give_grads([delta], seed)
        optimizer.step()
    assert optimizer.state[delta]["age"].tolist() == [300] * 4


def test_bf16_values_follow_fp32_arithmetic_rounded_once() -> None:
    low, full = parameter(50, dtype=torch.bfloat16), parameter(50, dtype=torch.bfloat16).float()
    optimizer = SparseAdamW([low], **OPTIONS)
    m, v, age = torch.zeros(50), torch.zeros(50), torch.zeros(50, dtype=torch.int32)
    for seed in range(5):
        give_grads([low], seed)
        assert low.grad is not None
        sparse_adamw_step_(full, low.grad.float(), m, v, age, **OPTIONS)
        full = full.bfloat16().float()
        optimizer.step()
    assert torch.equal(low.float(), full)
    assert torch.equal(optimizer.state[low]["exp_avg_sq"], v)


def saved_and_loaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference", [False, True])
def test_fact32_resumed_equals_uninterrupted(dtype: torch.dtype, reference: bool) -> None:
    def train(params: list[nn.Parameter], optimizer: SparseAdamW, updates: range) -> None:
        for t in updates:
            give_grads(params, t)
            optimizer.step()
            if t == 3:
                source = torch.arange(40).roll(7)
                source[::5] = -1
                seeds = torch.full((40,), 0.1), torch.full((40,), 0.02)
                move_state(
                    optimizer,
                    params[0],
                    source,
                    mean_grad=seeds[0],
                    mean_square=seeds[1],
                    updates=3,
                )

    def fresh() -> list[nn.Parameter]:
        return [parameter(40, dtype=dtype), parameter(5, 4, dtype=dtype, seed=1)]

    options = {**OPTIONS, "reference": reference}
    whole = fresh()
    uninterrupted = SparseAdamW(whole, **options)
    train(whole, uninterrupted, range(12))

    first = fresh()
    stopped = SparseAdamW(first, **options)
    train(first, stopped, range(6))
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = SparseAdamW(second)  # options come from the file
    resumed.load_state_dict(saved_and_loaded(stopped))
    train(second, resumed, range(6, 12))

    for p, q in zip(whole, second, strict=True):
        assert torch.equal(p, q)
        for key, expected in uninterrupted.state[p].items():
            assert torch.equal(resumed.state[q][key], expected), key


def test_fact34_load_never_recasts_and_never_shares() -> None:
    delta = parameter(6, dtype=torch.bfloat16)
    optimizer = SparseAdamW([delta])
    give_grads([delta], 0)
    optimizer.step()
    other = SparseAdamW([nn.Parameter(delta.detach().clone())])
    other.load_state_dict(optimizer.state_dict())
    (restored,) = other.state.values()
    dtypes = {key: value.dtype for key, value in restored.items()}
    fp32 = torch.float32
    assert dtypes == {"age": torch.int32, "exp_avg": fp32, "exp_avg_sq": fp32}
    for key, value in optimizer.state[delta].items():
        assert torch.equal(value, restored[key])
        assert value.data_ptr() != restored[key].data_ptr()


def test_load_honours_hooks_and_refuses_a_wrong_size() -> None:
    delta = parameter(6)
    optimizer = SparseAdamW([delta])
    give_grads([delta], 0)
    optimizer.step()
    saved = optimizer.state_dict()

    hooked = SparseAdamW([parameter(6)])

    def drop_state(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {}}

    hooked.register_load_state_dict_pre_hook(drop_state)
    hooked.load_state_dict(saved)
    assert not hooked.state

    with pytest.raises(ValueError, match=r"^age: got shape \(6,\), its parameter has shape \(5,\)"):
        SparseAdamW([parameter(5)]).load_state_dict(saved)


def test_defect14_no_gradient_means_no_state_and_no_change() -> None:
    used, unused = parameter(3), parameter(3, seed=1)
    before = unused.detach().clone()
    optimizer = SparseAdamW([used, unused], weight_decay=0.5)
    assert not optimizer.state
    give_grads([used], 0)
    optimizer.step()
    assert torch.equal(unused, before)
    assert list(optimizer.state) == [used]
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[used]["age"].tolist() == [1, 1, 1]


def test_closure_and_added_group() -> None:
    first, late = parameter(3), parameter(2, seed=1)
    optimizer = SparseAdamW([first], lr=0.1)
    optimizer.add_param_group({"params": [late], "lr": 0.0})
    before = late.detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = (first**2).sum() + (late**2).sum()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    assert torch.equal(late, before)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", "1e-3"),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("eps", 0.0),
        ("eps", float("inf")),
        ("weight_decay", -0.1),
    ],
)
def test_bad_option_is_named(option: str, value: object) -> None:
    make: Callable[..., object] = SparseAdamW
    with pytest.raises(ValueError, match=f"^{option}: got .*allowed is .*; use [^\n]*$"):
        make([parameter(1)], **{option: value})
    with pytest.raises(ValueError, match=f"^{option}: got "):
        SparseAdamW([parameter(1)]).add_param_group({"params": [parameter(2)], option: value})


def test_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"^params: got a torch.sparse_coo gradient"):
        SparseAdamW(table.parameters()).step()
