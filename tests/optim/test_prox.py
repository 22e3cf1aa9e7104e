"""Facts of the proximal operator and of the step that follows an optimizer's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sft.kernels.soft_threshold import soft_threshold, soft_threshold_many_
from sft.optim.adamw import SparseAdamW
from sft.optim.per_layer import PerLayerOptimizer
from sft.optim.prox import attach, proximal_step_, reference_threshold


@dataclass
class Penalty:
    parameters: list[Tensor] = field(default_factory=list)
    strength: float = 0.1
    rule: str = "soft"
    times_lr: bool = True


def gates(*sizes: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def run(parameters: list[nn.Parameter], optimizer: Any, updates: int = 5, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_s2_reference_threshold_is_three_statements() -> None:
    value = torch.arange(-3, 3.5, 0.5)
    expected = [-2, -1.5, -1, 0, -1, 0, 0, 0, 1, 0, 1, 1.5, 2]
    assert reference_threshold(value, 1.0).tolist() == expected
    assert soft_threshold(value, 1.0).tolist() == [-2, -1.5, -1, -0.5] + [0] * 5 + [0.5, 1, 1.5, 2]


def test_s3_proximal_gradient_meets_the_optimality_conditions() -> None:
    """min 1/2 x'Hx - b'x + lambda norm1(x): |g| <= lambda at zeros, g = -lambda sign(x) else."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    hessian = root @ root.t() / 12 + 0.1 * torch.eye(12, dtype=torch.float64)
    b = torch.randn(12, dtype=torch.float64, generator=generator)
    x, strength = nn.Parameter(torch.randn(12, dtype=torch.float64, generator=generator)), 0.5
    optimizer = torch.optim.SGD([x], lr=0.9 / float(torch.linalg.eigvalsh(hessian)[-1]))
    attach(optimizer, [Penalty([x], strength)])
    for _ in range(3000):
        x.grad = hessian @ x.detach() - b
        optimizer.step()
    gradient, zero = hessian @ x.detach() - b, x.detach() == 0
    assert 0 < int(zero.sum()) < 12
    assert (gradient[zero].abs() <= strength + 1e-9).all()
    on = ~zero
    torch.testing.assert_close(gradient[on], -strength * x.detach()[on].sign(), rtol=0, atol=1e-6)


MAKERS = [
    pytest.param(SparseAdamW, {}, id="SparseAdamW"),
    pytest.param(torch.optim.AdamW, {"fused": True}, id="fused"),
    pytest.param(torch.optim.AdamW, {"foreach": True}, id="foreach"),
    pytest.param(torch.optim.SGD, {"momentum": 0.9}, id="SGD"),
]


@pytest.mark.parametrize(("make", "options"), MAKERS)
def test_s5_strength_zero_is_the_optimizer_alone(make: Any, options: Any) -> None:
    plain, shrunk = gates(4, 1, 0, 7), gates(4, 1, 0, 7)
    one, other = make(plain, lr=0.05, **options), make(shrunk, lr=0.05, **options)
    attach(other, [Penalty(shrunk, 0.0)])
    run(plain, one)
    run(shrunk, other)
    assert all(torch.equal(a, b) for a, b in zip(plain, shrunk, strict=True))


@pytest.mark.parametrize(("make", "options"), MAKERS)
def test_each_step_is_the_optimizer_then_the_operator(make: Any, options: Any) -> None:
    plain, shrunk = gates(4, 7), gates(4, 7)
    one, other = make(plain, lr=0.05, **options), make(shrunk, lr=0.05, **options)
    handle = attach(other, [Penalty(shrunk, 3.0)])
    for seed in range(6):
        run(plain, one, 1, seed)
        with torch.no_grad():
            for gate in plain:
                gate.copy_(soft_threshold(gate, 0.05 * 3.0))
        run(shrunk, other, 1, seed)
        assert all(torch.equal(a, b) for a, b in zip(plain, shrunk, strict=True))
    handle.remove()
    run(plain, one, 1)
    run(shrunk, other, 1)
    assert all(torch.equal(a, b) for a, b in zip(plain, shrunk, strict=True))


def test_s6_no_learning_rate_no_shrinking() -> None:
    parameters = gates(6)
    before = parameters[0].detach().clone()
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    attach(optimizer, [Penalty(parameters, 100.0)])
    run(parameters, optimizer)
    assert torch.equal(parameters[0], before)


def test_threshold_follows_the_rate_of_the_group_the_strength_and_the_rule() -> None:
    fast, slow, free = gates(5, 5, 5)
    starts = [p.detach().clone() for p in (fast, slow, free)]
    optimizer = torch.optim.SGD([{"params": [fast], "lr": 0.2}, {"params": [slow, free]}], lr=0.1)
    for parameter in (fast, slow, free):
        parameter.grad = torch.zeros(5)
    penalty = Penalty([fast, slow], 1.0)
    attach(optimizer, [penalty])
    optimizer.step()
    assert torch.equal(fast, soft_threshold(starts[0], 0.2))
    assert torch.equal(slow, soft_threshold(starts[1], 0.1))
    assert torch.equal(free, starts[2])
    # a scheduler and a stage change both between steps; loading replaces the groups
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[1]["lr"], penalty.strength = 0.05, 2.0
    seen = [fast.detach().clone(), slow.detach().clone()]
    optimizer.step()
    assert torch.equal(fast, soft_threshold(seen[0], 0.4))
    assert torch.equal(slow, soft_threshold(seen[1], 0.1))
    penalty.rule, penalty.times_lr, penalty.strength = "reference", False, 0.25
    seen = slow.detach().clone()
    optimizer.step()
    assert torch.equal(slow, reference_threshold(seen, 0.25))


def test_learning_rate_as_a_tensor() -> None:
    parameters = gates(6)
    before = parameters[0].detach().clone()
    optimizer = torch.optim.AdamW(parameters, lr=torch.tensor(0.5), capturable=False, foreach=False)
    proximal_step_(optimizer, [Penalty(parameters, 1.0)])
    assert torch.equal(parameters[0], soft_threshold(before, 0.5))


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_an_update_that_the_loss_scaler_skipped_shrinks_nothing(lr: Any) -> None:
    parameters = gates(6)
    before = parameters[0].detach().clone()
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    attach(optimizer, [Penalty(parameters, 1.0)])
    parameters[0].grad = torch.full((6,), torch.inf)
    optimizer.found_inf, optimizer.grad_scale = (
        torch.tensor(1.0),
        torch.tensor(1.0),
    )  # as a scaler does
    optimizer.step()
    assert torch.equal(parameters[0], before)


def test_works_behind_the_wrapper_of_accelerate() -> None:
    parameters = gates(6)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    attach(Accelerator(cpu=True).prepare(optimizer), [Penalty(parameters, 100.0)])
    run(parameters, optimizer, 1)
    assert (parameters[0] == 0).all()


def test_works_around_per_layer_updates() -> None:
    parameters = gates(6)
    inner = torch.optim.SGD(parameters, lr=0.1)
    optimizer = PerLayerOptimizer(inner)
    for outermost in (optimizer, Accelerator(cpu=True).prepare(optimizer)):
        with torch.no_grad():
            parameters[0].fill_(1.0)
        handle = attach(outermost, [Penalty(parameters, 100.0)])
        parameters[0].sum().backward()
        assert (parameters[0] == 0.9).all()
        optimizer.step()
        assert (parameters[0] == 0).all()
        handle.remove()


def test_what_does_not_fit_is_refused() -> None:
    inside, outside = gates(3, 3)
    optimizer = torch.optim.SGD([inside], lr=0.1)
    with pytest.raises(ValueError, match=r"^penalties: got a parameter that the optimizer"):
        attach(optimizer, [Penalty([outside])])
    with pytest.raises(ValueError, match=r"^prox: got 'hard', allowed are soft, reference"):
        attach(optimizer, [Penalty([inside], rule="hard")])


def test_adamw_shrinks_in_its_own_pass_what_it_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has no gradient or several penalties, or another rule, after the step."""
    stepped, still, twice, other = parameters = gates(5, 5, 5, 5)
    optimizer = SparseAdamW(parameters, lr=0.1)
    attach(
        optimizer,
        [
            Penalty([stepped, still, twice], 1.0),
            Penalty([twice], 2.0),
            Penalty([other], 1.0, rule="reference"),
        ],
    )
    later: list[Tensor] = []

    def seen(values: list[Tensor], tau: float, factor: Tensor | None) -> None:
        later.extend(values)
        soft_threshold_many_(values, tau, factor)

    monkeypatch.setattr("sft.optim.prox.soft_threshold_many_", seen)
    plain = [nn.Parameter(p.detach().clone()) for p in parameters]
    alone = SparseAdamW(plain, lr=0.1)
    optimizer.zero_grad()
    for seed in range(3):
        for p, q in zip(parameters, plain, strict=True):
            p.grad = q.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        if seed:
            still.grad = plain[1].grad = None
        optimizer.step()
        alone.step()
        with torch.no_grad():
            for p in plain[:2]:
                p.copy_(soft_threshold(p, 0.1))
            plain[2].copy_(soft_threshold(soft_threshold(plain[2], 0.1), 0.2))
            plain[3].copy_(reference_threshold(plain[3], 0.1))
        assert all(map(torch.equal, parameters, plain))
    assert {id(p) for p in later} == {id(still), id(twice)}


def test_what_is_removed_leaves_the_update_alone() -> None:
    parameters = gates(5)
    optimizer = SparseAdamW(parameters, lr=0.1)
    attach(optimizer, [Penalty(parameters, 1.0)]).remove()
    assert optimizer.threshold is None
