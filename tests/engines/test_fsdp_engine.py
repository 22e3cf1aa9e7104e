"""FSDP's engine over DTensors of one process: what is whole for a moment, and what stays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sft.adapters.dynamics import SupportChange
from sft.adapters.gathered import gathered
from sft.adapters.ranks import ALONE
from sft.engines.fsdp import FsdpEngine
from sft.optim.move import move_state
from sft.optim.shards import is_sharded, local, whole


class Block(nn.Module):
    """Holds one of its parameters under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.values = nn.Parameter(torch.randn(6))
        self.frozen = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.inner = nn.Module()
        self.inner.tied = self.values

    def forward(self, x):
        return (x * self.values).sum() + self.frozen.sum()


@pytest.fixture(scope="module")
def process():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def run(process):
    """A sharded model whose optimizer has stepped once, its twin in one piece, and the engine."""
    from torch.distributed.fsdp import fully_shard

    twin, model = Block(), fully_shard(Block(), mesh=process)
    found = SimpleNamespace(model=model, twin=twin)
    found.plain = torch.optim.AdamW([twin.values], lr=0.25)
    found.optimizer = torch.optim.AdamW([model.values], lr=0.25)
    found.engine = FsdpEngine(model, SimpleNamespace(optimizer=found.optimizer), ALONE)

    def step(scale=1.0):
        for net, optimizer in ((twin, found.plain), (model, found.optimizer)):
            net(scale * torch.arange(6.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(whole(model.values).detach(), twin.values.detach())

    found.step = step
    step()
    yield found
    found.engine.close()


def test_parameters_are_whole_in_the_block_and_sharded_after_it(run) -> None:
    sharded, frozen = run.model.values, run.model.frozen
    assert is_sharded(sharded) and is_sharded(frozen)
    with gathered([sharded, frozen, nn.Parameter(torch.ones(1))]), torch.no_grad():
        assert run.model.inner.tied is run.model.values is not sharded
        assert not is_sharded(run.model.values) and run.model.values.requires_grad
        assert not run.model.frozen.requires_grad
        run.model.values.add_(1.0)
    assert run.model.inner.tied is run.model.values is sharded
    assert torch.equal(whole(sharded).detach(), run.twin.values.detach() + 1.0)
    assert torch.equal(whole(frozen), run.twin.frozen)


def test_what_a_block_that_fails_has_written_is_given_up(run) -> None:
    sharded = run.model.values
    with pytest.raises(ZeroDivisionError), gathered([sharded]), torch.no_grad():
        run.model.values.add_(1.0)
        raise ZeroDivisionError
    assert run.model.values is sharded and run.model.inner.tied is sharded
    assert torch.equal(whole(sharded).detach(), run.twin.values.detach())


def test_a_forward_pass_sees_what_was_published(run) -> None:
    """A pass without backward leaves weights gathered, which are then out of date."""
    x, sharded = torch.ones(6), run.model.values
    with torch.no_grad():
        before = run.model(x)
        run.model.reshard()
        run.model.unshard()
        local(sharded).add_(1.0)
    run.engine.publish([sharded])
    with torch.no_grad():
        assert float(run.model(x) - before) == pytest.approx(6.0, abs=1e-5)
        run.model.unshard()
    with gathered([sharded]), torch.no_grad():
        run.model.values.add_(1.0)
    with torch.no_grad():
        assert float(run.model(x) - before) == pytest.approx(12.0, abs=1e-5)


@pytest.mark.parametrize("inside", [False, True], ids=["sharded", "whole"])
def test_state_moves_as_in_one_piece(run, inside) -> None:
    source, seed = torch.tensor([5, -1, 0, 1, 2, -1]), torch.full((6,), 0.5)
    how = {"mean_grad": seed, "mean_square": seed.square(), "updates": 2}

    def move(parameter):
        run.engine.move(SupportChange("block", parameter, source, **how))

    if inside:  # as where a support changes: the parameter is a stand-in
        with gathered([run.model.values]):
            move(run.model.values)
    else:
        move(run.model.values)
    move_state(run.plain, run.twin.values, source, **how)
    state = run.optimizer.state[run.model.values]
    assert is_sharded(state["exp_avg"])
    for key, wanted in run.plain.state[run.twin.values].items():
        assert torch.equal(whole(state[key]), wanted), key
    run.step(2.0)


def test_the_state_of_a_checkpoint_is_whole_and_comes_back(run) -> None:
    tensors = run.engine.state()
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
    wanted = run.plain.state[run.twin.values]
    assert torch.equal(tensors["state//values//exp_avg"], wanted["exp_avg"])
    run.engine.begin_anew()
    assert not run.optimizer.state
    run.engine.load_state(tensors)
    assert is_sharded(run.optimizer.state[run.model.values]["exp_avg"])
    run.step(3.0)


def test_a_closed_engine_gathers_no_more(run) -> None:
    run.engine.close()
    with gathered([run.model.values]):
        assert is_sharded(run.model.values)
    assert run.engine.groups() == [[run.model.values]]
