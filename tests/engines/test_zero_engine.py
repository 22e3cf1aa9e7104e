"""ZeRO's engine over flat vectors of one process: the layout is DeepSpeed's, the rest is ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sft.adapters.dynamics import Penalty, SupportChange
from sft.adapters.ranks import ALONE
from sft.engines.masters import value_key
from sft.engines.optimizer_state import OptimizerState, names_of
from sft.engines.zero import ZeroEngine
from sft.optim.adamw import SparseAdamW
from sft.optim.move import move_state

SIZES = {"a": 3, "b": 4, "c": 2}
GROUPS = (("b", "a"), ("c",))  # a flat vector each, in this order
PADDING = 2


class Zero:
    """As much of DeepSpeed's optimizer of stages 1 and 2 as the engine knows."""

    def __init__(self, model, kind, **options):
        self.bit16_groups = [[getattr(model, name) for name in names] for names in GROUPS]
        self.single_partition_of_fp32_groups = []
        for parameters in self.bit16_groups:
            parts, start = [], 0
            for parameter in parameters:
                parts.append(parameter.detach().float())
                parameter._hp_mapping = SimpleNamespace(
                    hp_fragment_address=SimpleNamespace(start=start, numel=parameter.numel()),
                    lp_fragment_address=SimpleNamespace(start=0),
                )
                parameter._dp_group = dist.group.WORLD
                start += parameter.numel()
            flat = nn.Parameter(torch.cat([*parts, torch.zeros(PADDING)]))
            self.single_partition_of_fp32_groups.append(flat)
        groups = [{"params": [flat]} for flat in self.single_partition_of_fp32_groups]
        groups[1]["lr"] = 0.125
        self.optimizer = kind(groups, lr=0.25, **options)

    def _optimizer_step(self, i):
        held = self.optimizer.param_groups
        self.optimizer.param_groups = [held[i]]
        self.optimizer.step()
        self.optimizer.param_groups = held

    def step(self, scale):
        """Step all flat vectors, and hand the masters to forward."""
        for i, flat in enumerate(self.single_partition_of_fp32_groups):
            flat.grad = scale * torch.linspace(-1, 1, flat.numel())
            self._optimizer_step(i)
            start = 0
            for parameter in self.bit16_groups[i]:
                part = flat.detach()[start : start + parameter.numel()]
                parameter.data.copy_(part.view_as(parameter))
                start += parameter.numel()


@pytest.fixture(scope="module")
def process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(dtype=torch.float32, kind=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Module()
    for name, size in SIZES.items():
        model.register_parameter(name, nn.Parameter(torch.randn(size).to(dtype)))
    zero = Zero(model, kind, **options)
    wrapper = SimpleNamespace(optimizer=zero, step_was_skipped=False)
    return SimpleNamespace(model=model, zero=zero, engine=ZeroEngine(model, wrapper, ALONE))


def plain(run, kind=torch.optim.AdamW):
    """The same parameters, stepped in their own shapes."""
    twins = {
        name: nn.Parameter(p.detach().float().clone()) for name, p in run.model.named_parameters()
    }
    groups = [{"params": [twins[name] for name in names]} for names in GROUPS]
    groups[1]["lr"] = 0.125
    return twins, kind(groups, lr=0.25)


def step_twins(run, twins, optimizer, scale):
    for names, flat in zip(GROUPS, run.zero.single_partition_of_fp32_groups, strict=True):
        gradient, start = scale * torch.linspace(-1, 1, flat.numel()), 0
        for name in names:
            twins[name].grad = gradient[start : start + SIZES[name]].clone()
            start += SIZES[name]
    optimizer.step()


@pytest.fixture(params=[torch.optim.AdamW, SparseAdamW], ids=["torch", "ours"])
def pair(process, request):
    """A run on flat vectors that has stepped twice, and its twin in one piece."""
    run = build(kind=request.param)
    twins, optimizer = plain(run, request.param)
    for scale in (1.0, -2.0):
        run.zero.step(scale)
        step_twins(run, twins, optimizer, scale)
    return run, twins, optimizer


def assert_alike(run, twins, optimizer):
    names = names_of(run.model)
    wanted = OptimizerState(optimizer).gather({id(t): name for name, t in twins.items()})
    found = run.engine.state()
    values = {value_key(name): t.detach() for name, t in twins.items()}
    assert set(found) == set(wanted) | set(values)
    for key, tensor in (wanted | values).items():
        assert torch.equal(found[key], tensor), key
    for parameter in run.model.parameters():
        assert torch.equal(parameter.detach(), twins[names[id(parameter)]].detach())


def test_the_state_is_that_of_whole_parameters_by_name(pair) -> None:
    run, twins, optimizer = pair
    assert_alike(*pair)
    assert [[p.numel() for p in group] for group in run.engine.groups()] == [[4, 3], [2]]
    assert {name: tensor.tolist() for name, tensor in run.engine.values().items()} == {
        name: twin.tolist() for name, twin in twins.items()
    }
    assert all(state for state in optimizer.state.values())


def test_state_goes_to_a_run_that_has_not_stepped(pair) -> None:
    run, twins, optimizer = pair
    fresh = build(kind=type(optimizer))
    for group in fresh.zero.optimizer.param_groups:
        group["lr"] = 9.0
    fresh.engine.load_state(run.engine.state())
    assert [group["lr"] for group in fresh.zero.optimizer.param_groups] == [0.25, 0.125]
    assert_alike(fresh, twins, optimizer)
    fresh.zero.step(3.0)
    step_twins(run, twins, optimizer, 3.0)
    assert_alike(fresh, twins, optimizer)


def test_making_states_moves_no_weight(process) -> None:
    run = build(weight_decay=0.5)
    before = run.engine.values()
    kept = [torch.ones_like(flat) for flat in run.zero.single_partition_of_fp32_groups]
    for flat, gradient in zip(run.zero.single_partition_of_fp32_groups, kept, strict=True):
        flat.grad = gradient
    run.engine._shards.make_states()
    assert all(torch.equal(run.engine.values()[key], value) for key, value in before.items())
    held = run.zero.single_partition_of_fp32_groups
    assert all(flat.grad is gradient for flat, gradient in zip(held, kept, strict=True))
    groups = run.zero.optimizer.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.25, 0.5), (0.125, 0.5)]


def test_states_that_are_made_are_those_of_no_gradient(process) -> None:
    run = build(kind=torch.optim.SGD, momentum=0.5, weight_decay=0.5)
    run.engine._shards.make_states()
    states = [dict(state) for state in run.zero.optimizer.state.values()]
    assert len(states) == 2 and not any(state["momentum_buffer"].any() for state in states)


def test_numbers_of_a_state_come_back_as_numbers(process) -> None:
    """As those of DeepSpeed's own Adam, which counts steps by an integer."""
    run = build()
    flat = run.zero.single_partition_of_fp32_groups[0]
    run.zero.optimizer.state[flat] = {"step": 5, "exp_avg": torch.zeros_like(flat)}
    saved = {"step": torch.tensor(7.0), "exp_avg": torch.ones(4)}
    run.engine._shards.put_state(run.model.b, saved)
    state = run.zero.optimizer.state[flat]
    assert state["step"] == 7 and not isinstance(state["step"], torch.Tensor)
    assert state["exp_avg"].tolist() == [1.0] * 4 + [0.0] * 5


def test_a_process_holds_the_entries_of_its_part(process) -> None:
    run = build()
    shards, held = run.engine._shards, run.model.b._hp_mapping
    held.hp_fragment_address.start, held.hp_fragment_address.numel = 5, 2
    held.lp_fragment_address.start = 1
    shards.put_value(run.model.b, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert run.zero.single_partition_of_fp32_groups[0][5:7].tolist() == [2.0, 3.0]
    assert shards.value(run.model.b).tolist() == [0.0, 2.0, 3.0, 0.0], "the others have the rest"
    assert run.model.b.tolist() == [1.0, 2.0, 3.0, 4.0]
    run.model.b._hp_mapping = None  # another process has all of it
    shards.put_value(run.model.b, torch.ones(4))
    assert shards.value(run.model.b).tolist() == 4 * [0.0]
    assert run.zero.single_partition_of_fp32_groups[0][5:7].tolist() == [2.0, 3.0]


def test_a_support_that_changes_takes_masters_and_state_along(pair) -> None:
    run, twins, optimizer = pair
    source, seed = torch.tensor([3, -1, 0, 2]), torch.full((4,), 0.5)
    how = {"mean_grad": seed, "mean_square": seed.square(), "updates": 2}
    moved = torch.where(source < 0, 0.0, twins["b"].detach()[source.clamp(min=0)])
    with torch.no_grad():
        run.model.b.copy_(moved)
        twins["b"].copy_(moved)
    run.engine.move(SupportChange("layer", run.model.b, source, **how))
    move_state(optimizer, twins["b"], source, **how)
    assert_alike(*pair)
    run.zero.step(3.0)
    step_twins(run, twins, optimizer, 3.0)
    assert_alike(*pair)


def test_masters_keep_what_half_precision_rounds(process) -> None:
    run = build(torch.bfloat16)
    exact = torch.tensor([1.0 + 2.0**-12, 2.0, 3.0 + 2.0**-10])
    run.engine.load_values({value_key("a"): exact})
    assert torch.equal(run.engine.values()["a"], exact)
    assert torch.equal(run.model.a.detach(), exact.bfloat16())
    source = torch.tensor([2, 1, 0])
    run.model.a.data = run.model.a.data[source]
    run.engine.move(SupportChange("layer", run.model.a, source))
    assert torch.equal(run.engine.values()["a"], exact[source]), "of the masters, not of copies"
    run.model.a.data.fill_(7.0)
    run.engine.publish([run.model.a])
    assert run.engine.values()["a"].tolist() == [7.0, 7.0, 7.0]
    assert torch.equal(run.engine.values()["b"], run.model.b.detach().float())


def test_an_optimizer_begins_anew_in_place(pair) -> None:
    run, _, _ = pair
    flat = run.zero.single_partition_of_fp32_groups[0]
    held = run.zero.optimizer.state[flat]["exp_avg"]
    run.engine.begin_anew()
    state = run.zero.optimizer.state[flat]
    assert state["exp_avg"] is held
    assert all(not torch.as_tensor(value).any() for value in state.values())


def test_penalties_shrink_the_entries_of_their_parameters(process) -> None:
    run, calm = build(kind=torch.optim.SGD), build(kind=torch.optim.SGD)
    penalty = Penalty([run.model.a, run.model.c], 0.5)
    handle = run.engine.shrink([penalty])
    for one in (run, calm):
        one.zero.step(1.0)
    for name, rate in {"a": 0.25, "b": None, "c": 0.125}.items():
        free = calm.engine.values()[name]
        wanted = free if rate is None else free.sign() * (free.abs() - 0.5 * rate).clamp(min=0)
        torch.testing.assert_close(run.engine.values()[name], wanted)
    # all flat vectors in one step, each at the learning rate of its group
    with torch.no_grad():
        for flat in run.zero.single_partition_of_fp32_groups:
            flat.fill_(1.0)
            flat.grad = torch.zeros_like(flat)
    run.zero.optimizer.step()
    found = {name: set(value.tolist()) for name, value in run.engine.values().items()}
    assert found == {"a": {1 - 0.5 * 0.25}, "b": {1.0}, "c": {1 - 0.5 * 0.125}}
    handle.remove()
    before = run.engine.values()
    run.zero.step(0.0)
    assert all(torch.equal(run.engine.values()[name], before[name]) for name in before)


def test_the_scale_of_an_update_is_read_off_the_flat_vectors(process) -> None:
    run = build()
    assert run.engine.gradient_scale() == 1.0
    run.engine.watch([run.model.b])
    for skipped in (False, True):
        (run.model.b * torch.tensor([1.0, -4.0, 2.0, 0.0])).sum().backward()
        flat = run.zero.single_partition_of_fp32_groups[0]
        flat.grad = torch.cat([0.5 * run.model.b.grad, torch.full((5,), 9.0)])
        run.model.b.grad = None
        run.zero._optimizer_step(0)
        run.engine._optimizer.step_was_skipped = skipped
        assert run.engine.gradient_scale() == (0.0 if skipped else 2.0)
    run.engine.close()
    assert not run.model.b._backward_hooks
