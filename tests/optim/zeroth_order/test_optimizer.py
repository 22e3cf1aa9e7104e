"""Facts of the optimizer: what an update does to the weights, to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import sft.optim.zeroth_order.optimizer as module
from sft.kernels.displace import Magnitude, Random, displace_reference, mask_of
from sft.kernels.noise import noise
from sft.optim.prox import attach
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.keys import step_key
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.rules import single
from sft.optim.zeroth_order.trained import Trained, trained_set

SEED = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).mul_(0.02).to(dtype) for shape in shapes]
    return [nn.Parameter(tensor, requires_grad=False) for tensor in made]


def build(
    parameters: Sequence[nn.Parameter],
    *,
    lr: Any = 1e-3,
    decays: Sequence[float] = (),
    mask: Any = None,
    **changes: Any,
) -> ZerothOrderOptimizer:
    """One group, or one for each of `decays`, of a parameter each."""
    trained = [Trained(f"w{i}", p, 100 + i, mask) for i, p in enumerate(parameters)]
    groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": lr, "weight_decay": 0.0}]
    if decays:
        groups = [
            {"params": [p], "lr": lr, "weight_decay": decay}
            for p, decay in zip(parameters, decays, strict=True)
        ]
    return ZerothOrderOptimizer(groups, trained, ZerothOrderConfig(**changes), SEED)


def run(optimizer: Any, updates: Sequence[Sequence[float] | None]) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)
    for gradients in updates:
        inner.propose(gradients)
        optimizer.step()


def bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.detach().clone().view(sizes[t.element_size()]) for t in tensors]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian_table", "gaussian"])
def test_an_update_is_one_displacement(dtype: torch.dtype, kind: str) -> None:
    """w - sum_q fp32(lr g_q / n) z_q of keys (seed, update, query), numbers of the paper's rule."""
    parameters = weights((70, 80), (9,), dtype=dtype)
    start = [p.detach().clone() for p in parameters]
    optimizer = build(parameters, lr=0.03, queries=2, noise=kind)
    run(optimizer, [(0.5, -0.3), (0.1, 0.7)])
    for i, (w, p) in enumerate(zip(start, parameters, strict=True)):
        for update, gradients in enumerate([(0.5, -0.3), (0.1, 0.7)]):
            held = [torch.tensor(g, dtype=torch.float32).item() for g in gradients]
            draws = [(step_key(SEED, update, q), single(0.03 * g / 2)) for q, g in enumerate(held)]
            w = displace_reference(w, 100 + i, draws, kind=kind)
        assert same([w], [p])
    moved = (parameters[0].double() - start[0].double()).abs().max()
    assert 0.01 < float(moved) < 0.2 and optimizer.updates == 2


def test_z18_the_sign_rule_moves_every_weight_by_one_step() -> None:
    parameters = weights((50, 3), dtype=torch.float64)
    start = parameters[0].clone()
    optimizer = build(parameters, lr=0.25, update="sign")
    for gradient in (-3.0, 1e-6, 100.0):
        before = parameters[0].clone()
        run(optimizer, [[gradient]])
        assert (parameters[0] - before).abs().unique().tolist() == pytest.approx([0.25])
    run(optimizer, [[0.0]])
    assert optimizer.updates == 4 and not same([start], parameters)


def test_z15_decay_shrinks_its_group_alone_and_in_the_same_rounding() -> None:
    parameters = weights((40, 5), (7,))
    start = [p.detach().clone() for p in parameters]
    optimizer = build(parameters, lr=0.1, decays=(0.5, 0.0))
    run(optimizer, [[0.2]])
    draws = [(step_key(SEED, 0, 0), single(0.1 * torch.tensor(0.2).item()))]
    for i, decay in enumerate((single(0.1 * 0.5), 0.0)):
        expected = displace_reference(start[i], 100 + i, draws, decay=decay)
        assert same([expected], [parameters[i]])
    shrunk = displace_reference(start[0], 100, draws)
    assert not same([shrunk], [parameters[0]])


@pytest.mark.parametrize("rule", ["sgd", "sign", "momentum", "adam"])
@pytest.mark.parametrize("bad", [None, [math.nan, 0.1], [0.1, math.inf]])
def test_z15_a_skipped_update_is_logged_and_leaves_weights_and_state(rule: str, bad: Any) -> None:
    parameters = weights((40, 5))
    optimizer = build(parameters, decays=[0.1], update=rule, queries=2)
    run(optimizer, [[0.5, 0.25]])
    before = [p.detach().clone() for p in parameters]
    state = {name: t.clone() for name, t in optimizer.state[parameters[0]].items()}
    keys = optimizer.keys(2)
    run(optimizer, [bad])
    assert same(before, parameters)
    assert all(torch.equal(t, state[n]) for n, t in optimizer.state[parameters[0]].items())
    assert (optimizer.updates, optimizer.skipped) == (2, 1)
    assert [row.gradients for row in optimizer.log.rows] == [(0.5, 0.25), None]
    assert not set(keys) & set(optimizer.keys(2))  # the next update has directions of its own


def test_a_step_needs_a_proposal_of_the_right_length() -> None:
    optimizer = build(weights((4,)), queries=2)
    with pytest.raises(RuntimeError, match="nothing was proposed"):
        optimizer.step()
    with pytest.raises(ValueError, match="gradients: got 1, allowed are 2"):
        optimizer.propose([1.0])
    run(optimizer, [[1.0, 2.0]])
    with pytest.raises(RuntimeError, match="nothing was proposed"):
        optimizer.step()


def test_a_closure_may_propose() -> None:
    parameters, other = weights((6, 6)), weights((6, 6))
    optimizer = build(parameters)

    def evaluate() -> float:
        optimizer.propose([0.5])
        return 3.25

    assert optimizer.step(evaluate) == 3.25
    run(build(other), [[0.5]])
    assert same(parameters, other)


def test_what_is_applied_is_what_the_log_holds() -> None:
    third = 1 / 3
    parameters, other = weights((20, 20)), weights((20, 20))
    optimizer = build(parameters, lr=1.0, log_dtype="float16")
    run(optimizer, [[third]])
    (row,) = optimizer.log.rows
    assert row.gradients == (torch.tensor(third, dtype=torch.float16).item(),)
    run(build(other, lr=1.0), [row.gradients])
    assert same(parameters, other)


def test_groups_of_one_rate_take_one_pass_and_no_other_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = module.displace

    def counted(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(tensors))
        return real(tensors, *args, **kwargs)

    monkeypatch.setattr(module, "displace", counted)
    parameters, alone = weights((8, 8), (8,), (3,)), weights((8, 8), (8,), (3,))
    optimizer = build(parameters, decays=(0.1, 0.0, 0.0))
    run(optimizer, [[0.5], None, [0.0]])
    assert calls == [3, 3]  # the skipped update takes none, the one of 0 decays
    optimizer.param_groups[2]["lr"] = 1.0
    run(optimizer, [[0.5]])
    assert calls == [3, 3, 2, 1]
    for i, p in enumerate(alone):
        single_group = ZerothOrderOptimizer(
            [{"params": [p], "lr": 1e-3, "weight_decay": 0.1 if i == 0 else 0.0}],
            [Trained(f"w{i}", p, 100 + i)],
            ZerothOrderConfig(),
            SEED,
        )
        run(single_group, [[0.5], None, [0.0]])
        single_group.param_groups[0]["lr"] = 1.0 if i == 2 else 1e-3
        run(single_group, [[0.5]])
    assert same(parameters, alone)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian_table"])
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_moved_weights_are_restored_in_the_pass_of_the_update(rule: str, kind: str) -> None:
    """fp64, where +eps and back is exact to 1e-15; the update is far below eps."""
    parameters, other = (
        weights((30, 30), dtype=torch.float64),
        weights((30, 30), dtype=torch.float64),
    )
    optimizer, plain = (
        build(some, lr=1e-7, update=rule, noise=kind) for some in (parameters, other)
    )
    for gradients in ([0.5], None, [0.25]):
        (key,) = optimizer.keys(1)
        held = [parameters[0].data]
        module.displace(held, [100], [(key, 0.125)], kind=kind, out=held)
        optimizer.moved = ((key, 0.125),)
        run(optimizer, [gradients])
        run(plain, [gradients])
        assert optimizer.moved == ()
        torch.testing.assert_close(parameters[0], other[0], rtol=0, atol=1e-12)


def test_restoring_and_updating_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = module.displace
    monkeypatch.setattr(module, "displace", lambda *a, **k: (seen.append(a[2]), real(*a, **k)))
    optimizer = build(weights((8, 8)), lr=0.5)
    (key,) = optimizer.keys(1)
    optimizer.moved = ((key, 0.25),)
    run(optimizer, [[1.0]])
    assert seen == [[(key, 0.25)]]  # 0.5 * 1 - 0.25


def test_learning_rates_follow_a_schedule_and_may_be_tensors() -> None:
    parameters, other = weights((9, 9)), weights((9, 9))
    rates = [1.0, 0.5, 0.25, 0.125]
    first, second = build(parameters, lr=0.5), build(other, lr=torch.tensor(0.5))
    for optimizer in (first, second):
        schedule = LambdaLR(optimizer, lambda step: rates[step])
        for gradient in (0.5, 0.25, 0.75):
            run(optimizer, [[gradient]])
            schedule.step()
    assert isinstance(second.param_groups[0]["lr"], Tensor)
    expected = [(0.5,), (0.25,), (0.125,)]
    assert [row.rates for row in first.log.rows] == expected
    assert [row.rates for row in second.log.rows] == expected
    assert same(parameters, other)


def test_accelerate_wraps_it_and_zero_grad_and_prox_hooks_work() -> None:
    parameters, other = weights((9, 9)), weights((9, 9))
    wrapped = Accelerator(cpu=True).prepare_optimizer(build(parameters, decays=[0.1]))
    plain = build(other, decays=[0.1])

    class Penalty:
        parameters: Sequence[Tensor]
        strength, rule, times_lr = 5.0, "soft", True

    penalties = Penalty(), Penalty()
    penalties[0].parameters, penalties[1].parameters = parameters, other
    attach(wrapped, penalties[:1])
    attach(plain, penalties[1:])
    run(wrapped, [[0.5], [0.25]])
    run(plain, [[0.5], [0.25]])
    wrapped.zero_grad()
    assert same(parameters, other) and (parameters[0] == 0).any()
    before = parameters[0].clone()
    run(wrapped, [None])
    assert same([before], parameters)  # a skipped update shrinks nothing


def test_frozen_tensors_move_and_version_counters_tell() -> None:
    parameters = weights((9, 9))
    version = parameters[0]._version
    run(build(parameters), [[0.5]])
    assert not parameters[0].requires_grad and parameters[0].grad is None
    assert parameters[0]._version >= version


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: build(p, lr=-1.0), "lr: got -1.0"),
        (lambda p: build(p, lr=math.nan), "lr: got nan"),
        (lambda p: build(p, decays=[-0.1]), "weight_decay: got -0.1"),
        (lambda p: build(p, decays=[0.1], update="conservative"), "weight_decay: got 0.1 with"),
        (lambda p: build(p).add_param_group({"params": weights((2,)), "lr": 0.1}), "one more"),
        (lambda p: ZerothOrderOptimizer([{"params": p}], [], ZerothOrderConfig(), 0), "lr: a"),
        (
            lambda p: ZerothOrderOptimizer([{"params": p, "lr": 0.1}], [], ZerothOrderConfig(), 0),
            "groups: hold 1 parameters, other ones than the 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make(weights((4,)))


def test_z18_conservative_never_ends_above_the_loss_it_began_with() -> None:
    """The candidates are evaluated at the very bits to which the update would lead."""
    from sft.optim.zeroth_order.estimate import conservative_choice, projected_gradients

    parameters = weights((24,))
    optimizer = build(parameters, lr=0.05, update="conservative", estimator="two_side", eps=1e-2)
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
        run(optimizer, [[choice * g]])
        now = loss(())
        assert now == (value, forth, back)[choice] and now <= value
        chosen.append(choice)
        value = now
    assert set(chosen) == {1, 0, -1}


def test_one_set_of_coefficients_needs_one_rate() -> None:
    optimizer = build(weights((4,), (5,)), decays=(0.0, 0.0))
    assert optimizer.coefficients([0.5]) == optimizer.coefficients([0.5], optimizer.param_groups[1])
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"lr: got 0\.001, 0\.5 in different groups"):
        optimizer.coefficients([0.5])


def masked(dtype: torch.dtype, sparsity: float, **changes: Any) -> ZerothOrderOptimizer:
    parameters = weights((64, 80), (3, 5, 7), dtype=dtype)
    config = ZerothOrderConfig(sparsity=sparsity, **changes)
    trained = trained_set([("a", parameters[0]), ("b", parameters[1])], config, SEED)
    group = {"params": parameters, "lr": 0.01, "weight_decay": changes.get("decay", 0.0)}
    return ZerothOrderOptimizer([group], trained, config, SEED)


@pytest.mark.parametrize("mask", ["magnitude", "random"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_m1_unmasked_weights_keep_their_bits(mask: str, rule: str, dtype: torch.dtype) -> None:
    """Decay included, and m3: the masks only ever shrink."""
    optimizer = masked(dtype, 0.75, mask=mask, update=rule)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    start = [t.parameter.detach().clone() for t in optimizer.trained]
    masks = [mask_of(t.parameter, t.id, t.mask) for t in optimizer.trained if t.mask]
    for gradient in (0.5, -0.25, 0.75, 0.5, -0.5, 0.5):
        former = [m.clone() for m in masks]
        run(optimizer, [[gradient]])
        masks = [mask_of(t.parameter, t.id, t.mask) for t in optimizer.trained if t.mask]
        assert not any((now & ~before).any() for now, before in zip(masks, former, strict=True))
    for t, w in zip(optimizer.trained, start, strict=True):
        assert t.mask is not None
        free = mask_of(w, t.id, t.mask)
        assert same([t.parameter[~free]], [w[~free]])
        assert float((t.parameter != w)[free].float().mean()) > 0.9


def test_m3_a_weight_that_outgrows_the_threshold_is_frozen_for_good() -> None:
    parameters = weights((64, 64))
    optimizer = build(parameters, lr=0.01, mask=Magnitude(0.01))
    out = torch.zeros(64, 64, dtype=torch.bool)
    for update in range(20):
        before = parameters[0].clone()
        run(optimizer, [[(-1.0) ** update]])
        assert same([parameters[0][out]], [before[out]])
        out |= parameters[0].abs() > 0.01
    assert float((out & (parameters[0].abs() < 0.02)).float().mean()) > 0.3


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_m4_a_mask_of_everything_is_no_mask_bit_for_bit(rule: str) -> None:
    plain, all_of_it, random = (weights((50, 90)) for _ in range(3))
    for parameters, mask in ((plain, None), (all_of_it, Magnitude(1e9)), (random, Random(3, 1.0))):
        run(build(parameters, mask=mask, update=rule), [[0.5], [0.25]])
    assert same(plain, all_of_it) and same(plain, random)


def test_m4_sparsity_0_has_no_mask_and_08_trains_a_fifth() -> None:
    assert [t.mask for t in masked(torch.float32, 0.0).trained] == [None, None]
    optimizer = masked(torch.float32, 0.8)
    start = optimizer.trained[0].parameter.detach().clone()
    run(optimizer, [[0.5]])
    assert float((optimizer.trained[0].parameter != start).float().mean()) == pytest.approx(
        0.2, abs=0.005
    )


def test_m6_between_steps_one_number_a_tensor_is_held() -> None:
    optimizer = masked(torch.float32, 0.75)
    run(optimizer, [[0.5]])
    held = [v for v in vars(optimizer).values() if isinstance(v, Tensor)]
    assert held == [] and not optimizer.state
    saved = optimizer.state_dict()["zeroth_order"]
    assert sum(t.numel() * t.element_size() for t in saved["log"].values()) == 4 + 8 + 4 + 4
    assert all(isinstance(t.mask, Magnitude) for t in optimizer.trained)


def explicit(optimizer: ZerothOrderOptimizer, gradients: Sequence[float]) -> list[Tensor]:
    """mean_q g_q z_q of every trained tensor, zero where its mask is."""
    keys = optimizer.keys(len(gradients))
    found = []
    for t in optimizer.trained:
        w = t.parameter.detach()
        z = [noise(key, t.id, w.numel(), kind="rademacher").view(w.shape) for key in keys]
        mean = torch.stack([g * one for g, one in zip(gradients, z, strict=True)]).mean(0)
        found.append(mean if t.mask is None else mean * mask_of(w, t.id, t.mask))
    return found


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("mask", [None, Random(9, 0.3)])
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_state_is_that_of_torchs_optimizers(rule: str, mask: Any, decay: float) -> None:
    shapes = ((300, 257), (7,))  # the first is of several chunks
    parameters, theirs = weights(*shapes), weights(*shapes)
    optimizer = build(parameters, decays=(decay,) * 2, mask=mask, update=rule, queries=2)
    if rule == "adam":
        torchs: Any = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=decay)
    else:
        torchs = torch.optim.SGD(theirs, lr=1e-3, momentum=0.9)
    for gradients in ([0.5, -0.25], [0.125, 2.0], None, [-1.0, 0.5]):
        if gradients is not None:
            for p, gradient in zip(theirs, explicit(optimizer, gradients), strict=True):
                p.grad = gradient
                if rule == "momentum" and decay:
                    p.data.mul_(1 - 1e-3 * decay)  # decoupled
            torchs.step()
        run(optimizer, [gradients])
    for t, p in zip(optimizer.trained, theirs, strict=True):
        free = torch.ones_like(p, dtype=torch.bool)
        if t.mask is not None:
            free = mask_of(p, t.id, t.mask)
        torch.testing.assert_close(t.parameter[free], p[free], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_stateful_rules_take_any_layout_and_no_dense_temporary(
    rule: str, largest_tensor: Any
) -> None:
    turned = nn.Parameter(torch.randn(600, 500).t(), requires_grad=False)
    straight = nn.Parameter(turned.detach().clone().contiguous(), requires_grad=False)
    big, small = build([straight], update=rule), build([turned], update=rule)
    run(big, [[0.5]])
    run(small, [[0.5]])
    big.propose([0.25])
    assert largest_tensor(big.step) <= max(4 * straight.numel(), 2**20)
    run(small, [[0.25]])
    assert same([turned.contiguous()], [straight]) and not turned.is_contiguous()
    parameters = weights((2**11, 2**10))
    wide = build(parameters, update=rule)
    run(wide, [[0.5]])
    new = []
    wide.propose([0.5])
    from torch.utils._python_dispatch import TorchDispatchMode

    held = {p.untyped_storage().data_ptr() for p in parameters}
    held |= {t.untyped_storage().data_ptr() for t in wide.state[parameters[0]].values()}

    class Gauge(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in held:
                    new.append(t.untyped_storage().nbytes())
            return out

    with Gauge():
        wide.step()
    assert max(new) <= 2**20


@pytest.mark.parametrize(("rule", "moments"), [("momentum", 1), ("adam", 2)])
def test_dense_state_of_a_whole_model_is_refused(rule: str, moments: int) -> None:
    def make(size: int | None, **changes: Any) -> ZerothOrderOptimizer:
        parameters = weights((100,))
        trained = [Trained("w", parameters[0], 1)]
        config = ZerothOrderConfig(update=rule, **changes)
        group = {"params": parameters, "lr": 1e-3}
        return ZerothOrderOptimizer([group], trained, config, SEED, model_size=size)

    with pytest.raises(ValueError, match=f"update: got '{rule}'.*of 100 trained weights"):
        make(999)
    make(1000)
    make(None)
    run(make(100, dense_state=True), [[0.5]])
    optimizer = make(1000)
    run(optimizer, [[0.5]])
    assert len(optimizer.state[optimizer.trained[0].parameter]) == moments


def test_the_reference_mode_moves_along_torchs_noise() -> None:
    parameters, other = weights((9, 9)), weights((9, 9))
    optimizer = build(parameters, lr=0.5, decays=[0.1], mode="reference")
    (key,) = optimizer.keys(1)
    run(optimizer, [[0.25]])
    z = torch.randn(9, 9, generator=torch.Generator().manual_seed(key % 2**63))
    expected = other[0] - 0.5 * (0.25 * z + 0.1 * other[0])
    torch.testing.assert_close(parameters[0].data, expected.data)
