"""Facts of the optimizer: what an update does to the weights, to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import sft.optim.zeroth_order.optimizer as module
from sft.kernels.displace import displace_reference
from sft.optim.prox import attach
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.keys import step_key
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.rules import single
from sft.optim.zeroth_order.trained import Trained

SEED = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian_table", "gaussian"])
def test_an_update_is_one_displacement(zo: Any, dtype: torch.dtype, kind: str) -> None:
    """w - sum_q fp32(lr g_q / n) z_q of keys (seed, update, query), numbers of the paper's rule."""
    parameters = zo.weights((70, 80), (9,), dtype=dtype)
    start = [p.detach().clone() for p in parameters]
    optimizer = zo.build(parameters, lr=0.03, queries=2, noise=kind)
    zo.run(optimizer, [(0.5, -0.3), (0.1, 0.7)])
    for i, (w, p) in enumerate(zip(start, parameters, strict=True)):
        for update, gradients in enumerate([(0.5, -0.3), (0.1, 0.7)]):
            held = [torch.tensor(g, dtype=torch.float32).item() for g in gradients]
            draws = [(step_key(SEED, update, q), single(0.03 * g / 2)) for q, g in enumerate(held)]
            w = displace_reference(w, 100 + i, draws, kind=kind)
        assert zo.same([w], [p])
    moved = (parameters[0].double() - start[0].double()).abs().max()
    assert 0.01 < float(moved) < 0.2 and optimizer.updates == 2


def test_z18_the_sign_rule_moves_every_weight_by_one_step(zo: Any) -> None:
    parameters = zo.weights((50, 3), dtype=torch.float64)
    start = parameters[0].clone()
    optimizer = zo.build(parameters, lr=0.25, update="sign")
    for gradient in (-3.0, 1e-6, 100.0):
        before = parameters[0].clone()
        zo.run(optimizer, [[gradient]])
        assert (parameters[0] - before).abs().unique().tolist() == pytest.approx([0.25])
    zo.run(optimizer, [[0.0]])
    assert optimizer.updates == 4 and not zo.same([start], parameters)


def test_z15_decay_shrinks_its_group_alone_and_in_the_same_rounding(zo: Any) -> None:
    parameters = zo.weights((40, 5), (7,))
    start = [p.detach().clone() for p in parameters]
    optimizer = zo.build(parameters, lr=0.1, decays=(0.5, 0.0))
    zo.run(optimizer, [[0.2]])
    draws = [(step_key(SEED, 0, 0), single(0.1 * torch.tensor(0.2).item()))]
    for i, decay in enumerate((single(0.1 * 0.5), 0.0)):
        expected = displace_reference(start[i], 100 + i, draws, decay=decay)
        assert zo.same([expected], [parameters[i]])
    shrunk = displace_reference(start[0], 100, draws)
    assert not zo.same([shrunk], [parameters[0]])


@pytest.mark.parametrize("rule", ["sgd", "sign", "momentum", "adam"])
@pytest.mark.parametrize("bad", [None, [math.nan, 0.1], [0.1, math.inf]])
def test_z15_a_skipped_update_is_logged_and_leaves_weights_and_state(
    zo: Any, rule: str, bad: Any
) -> None:
    parameters = zo.weights((40, 5))
    optimizer = zo.build(parameters, decays=[0.1], update=rule, queries=2)
    zo.run(optimizer, [[0.5, 0.25]])
    before = [p.detach().clone() for p in parameters]
    state = {name: t.clone() for name, t in optimizer.state[parameters[0]].items()}
    keys = optimizer.keys(2)
    zo.run(optimizer, [bad])
    assert zo.same(before, parameters)
    assert all(torch.equal(t, state[n]) for n, t in optimizer.state[parameters[0]].items())
    assert (optimizer.updates, optimizer.skipped) == (2, 1)
    assert [row.gradients for row in optimizer.log.rows] == [(0.5, 0.25), None]
    assert not set(keys) & set(optimizer.keys(2))  # the next update has directions of its own


def test_a_step_needs_a_proposal_of_the_right_length(zo: Any) -> None:
    optimizer = zo.build(zo.weights((4,)), queries=2)
    with pytest.raises(RuntimeError, match="nothing was proposed"):
        optimizer.step()
    with pytest.raises(ValueError, match="gradients: got 1, allowed are 2"):
        optimizer.propose([1.0])
    zo.run(optimizer, [[1.0, 2.0]])
    with pytest.raises(RuntimeError, match="nothing was proposed"):
        optimizer.step()


def test_a_closure_may_propose(zo: Any) -> None:
    parameters, other = zo.weights((6, 6)), zo.weights((6, 6))
    optimizer = zo.build(parameters)

    def evaluate() -> float:
        optimizer.propose([0.5])
        return 3.25

    assert optimizer.step(evaluate) == 3.25
    zo.run(zo.build(other), [[0.5]])
    assert zo.same(parameters, other)


def test_what_is_applied_is_what_the_log_holds(zo: Any) -> None:
    third = 1 / 3
    parameters, other = zo.weights((20, 20)), zo.weights((20, 20))
    optimizer = zo.build(parameters, lr=1.0, log_dtype="float16")
    zo.run(optimizer, [[third]])
    (row,) = optimizer.log.rows
    assert row.gradients == (torch.tensor(third, dtype=torch.float16).item(),)
    zo.run(zo.build(other, lr=1.0), [row.gradients])
    assert zo.same(parameters, other)


def test_groups_of_one_rate_take_one_pass_and_no_other_do(
    zo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = module.displace

    def counted(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(tensors))
        return real(tensors, *args, **kwargs)

    monkeypatch.setattr(module, "displace", counted)
    parameters, alone = zo.weights((8, 8), (8,), (3,)), zo.weights((8, 8), (8,), (3,))
    optimizer = zo.build(parameters, decays=(0.1, 0.0, 0.0))
    zo.run(optimizer, [[0.5], None, [0.0]])
    assert calls == [3, 3]  # the skipped update takes none, the one of 0 decays
    optimizer.param_groups[2]["lr"] = 1.0
    zo.run(optimizer, [[0.5]])
    assert calls == [3, 3, 2, 1]
    for i, p in enumerate(alone):
        single_group = ZerothOrderOptimizer(
            [{"params": [p], "lr": 1e-3, "weight_decay": 0.1 if i == 0 else 0.0}],
            [Trained(f"w{i}", p, 100 + i)],
            ZerothOrderConfig(),
            SEED,
        )
        zo.run(single_group, [[0.5], None, [0.0]])
        single_group.param_groups[0]["lr"] = 1.0 if i == 2 else 1e-3
        zo.run(single_group, [[0.5]])
    assert zo.same(parameters, alone)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian_table"])
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_moved_weights_are_restored_in_the_pass_of_the_update(
    zo: Any, rule: str, kind: str
) -> None:
    """fp64, where +eps and back is exact to 1e-15; the update is far below eps."""
    parameters, other = (
        zo.weights((30, 30), dtype=torch.float64),
        zo.weights((30, 30), dtype=torch.float64),
    )
    optimizer, plain = (
        zo.build(some, lr=1e-7, update=rule, noise=kind) for some in (parameters, other)
    )
    for gradients in ([0.5], None, [0.25]):
        (key,) = optimizer.keys(1)
        held = [parameters[0].data]
        module.displace(held, [100], [(key, 0.125)], kind=kind, out=held)
        optimizer.moved = ((key, 0.125),)
        zo.run(optimizer, [gradients])
        zo.run(plain, [gradients])
        assert optimizer.moved == ()
        torch.testing.assert_close(parameters[0], other[0], rtol=0, atol=1e-12)


def test_restoring_and_updating_is_one_pass(zo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = module.displace
    monkeypatch.setattr(module, "displace", lambda *a, **k: (seen.append(a[2]), real(*a, **k)))
    optimizer = zo.build(zo.weights((8, 8)), lr=0.5)
    (key,) = optimizer.keys(1)
    optimizer.moved = ((key, 0.25),)
    zo.run(optimizer, [[1.0]])
    assert seen == [[(key, 0.25)]]  # 0.5 * 1 - 0.25


def test_learning_rates_follow_a_schedule_and_may_be_tensors(zo: Any) -> None:
    parameters, other = zo.weights((9, 9)), zo.weights((9, 9))
    rates = [1.0, 0.5, 0.25, 0.125]
    first, second = zo.build(parameters, lr=0.5), zo.build(other, lr=torch.tensor(0.5))
    for optimizer in (first, second):
        schedule = LambdaLR(optimizer, lambda step: rates[step])
        for gradient in (0.5, 0.25, 0.75):
            zo.run(optimizer, [[gradient]])
            schedule.step()
    assert isinstance(second.param_groups[0]["lr"], Tensor)
    expected = [(0.5,), (0.25,), (0.125,)]
    assert [row.rates for row in first.log.rows] == expected
    assert [row.rates for row in second.log.rows] == expected
    assert zo.same(parameters, other)


def test_accelerate_wraps_it_and_zero_grad_and_prox_hooks_work(zo: Any) -> None:
    parameters, other = zo.weights((9, 9)), zo.weights((9, 9))
    wrapped = Accelerator(cpu=True).prepare_optimizer(zo.build(parameters, decays=[0.1]))
    plain = zo.build(other, decays=[0.1])

    class Penalty:
        parameters: Sequence[Tensor]
        strength, rule, times_lr = 5.0, "soft", True

    penalties = Penalty(), Penalty()
    penalties[0].parameters, penalties[1].parameters = parameters, other
    attach(wrapped, penalties[:1])
    attach(plain, penalties[1:])
    zo.run(wrapped, [[0.5], [0.25]])
    zo.run(plain, [[0.5], [0.25]])
    wrapped.zero_grad()
    assert zo.same(parameters, other) and (parameters[0] == 0).any()
    before = parameters[0].clone()
    zo.run(wrapped, [None])
    assert zo.same([before], parameters)  # a skipped update shrinks nothing


def test_parameters_that_are_frozen_move_and_get_no_gradient(zo: Any) -> None:
    parameters = zo.weights((9, 9))
    start = parameters[0].clone()
    zo.run(zo.build(parameters), [[0.5]])
    assert not zo.same([start], parameters)
    assert not parameters[0].requires_grad and parameters[0].grad is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda zo, p: zo.build(p, lr=-1.0), "lr: got -1.0"),
        (lambda zo, p: zo.build(p, lr=math.nan), "lr: got nan"),
        (lambda zo, p: zo.build(p, decays=[-0.1]), "weight_decay: got -0.1"),
        (
            lambda zo, p: zo.build(p, decays=[0.1], update="conservative"),
            "weight_decay: got 0.1 with",
        ),
        (
            lambda zo, p: zo.build(p).add_param_group({"params": zo.weights((2,)), "lr": 0.1}),
            "one more",
        ),
        (lambda zo, p: ZerothOrderOptimizer([{"params": p}], [], ZerothOrderConfig(), 0), "lr: a"),
        (
            lambda zo, p: ZerothOrderOptimizer(
                [{"params": p, "lr": 0.1}], [], ZerothOrderConfig(), 0
            ),
            "groups: hold 1 parameters, other ones than the 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(zo: Any, make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make(zo, zo.weights((4,)))


def test_z18_conservative_never_ends_above_the_loss_it_began_with(zo: Any) -> None:
    """The candidates are evaluated at the very bits to which the update would lead."""
    from sft.optim.zeroth_order.estimate import conservative_choice, projected_gradients

    parameters = zo.weights((24,))
    optimizer = zo.build(parameters, lr=0.05, update="conservative", estimator="two_side", eps=1e-2)
    target = torch.randn(24, generator=torch.Generator().manual_seed(3)) * 0.1

    def loss(draws: Sequence[tuple[int, float]]) -> float:
        at = displace_reference(parameters[0], 100, draws)
        return float((at - target).double().square().sum() + (at * 40).cos().double().sum())

    chosen, value = [], loss(())
    for _ in range(60):
        (key,) = optimizer.keys(1)
        sides = [loss([(key, c)]) for c in (-1e-2, 1e-2)]
        (g,) = projected_gradients(optimizer.config, sides[:1], sides[1:], value) or (math.nan,)
        step = optimizer.coefficients([g])
        forth, back = loss(step), loss([(k, -c) for k, c in step])
        choice = conservative_choice(value, forth, back)
        zo.run(optimizer, [[choice * g]])
        now = loss(())
        assert now == (value, forth, back)[choice] and now <= value
        chosen.append(choice)
        value = now
    assert set(chosen) == {1, 0, -1}


def test_one_set_of_coefficients_needs_one_rate(zo: Any) -> None:
    optimizer = zo.build(zo.weights((4,), (5,)), decays=(0.0, 0.0))
    assert optimizer.coefficients([0.5]) == optimizer.coefficients([0.5], optimizer.param_groups[1])
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"lr: got 0\.001, 0\.5 in different groups"):
        optimizer.coefficients([0.5])


def test_the_reference_mode_moves_along_torchs_noise(zo: Any) -> None:
    parameters, other = zo.weights((9, 9)), zo.weights((9, 9))
    optimizer = zo.build(parameters, lr=0.5, decays=[0.1], mode="reference")
    (key,) = optimizer.keys(1)
    zo.run(optimizer, [[0.25]])
    z = torch.randn(9, 9, generator=torch.Generator().manual_seed(key % 2**63))
    expected = other[0] - 0.5 * (0.25 * z + 0.1 * other[0])
    torch.testing.assert_close(parameters[0].data, expected.data)
