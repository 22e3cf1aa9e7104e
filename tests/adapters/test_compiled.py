"""Adapted models in one compiled graph: the gradients of eager, whatever moves between steps."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sft
from sft.adapters.layer import sparse_layers
from sft.adapters.resident import enter_resident, sync_resident

pytestmark = pytest.mark.filterwarnings("ignore")  # the tracer warns of what it does itself

IDS = torch.arange(20).view(2, 10)
X = torch.linspace(-1, 1, 28).view(2, 14)


class Small(nn.Module):
    """Traced in a fraction of the time that a language model takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(14, 20), nn.Linear(20, 14, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()


def adapted(llama, name: str, *, resident: bool):
    torch.manual_seed(1)
    if name == "spiel":
        config = sft.SpielConfig(density=0.05, target_modules=["up", "down"])
        model = get_peft_model(Small(), config)
    else:
        config = sft.S2FTConfig(density=0.2, selection="random")
        model = get_peft_model(llama(num_hidden_layers=1), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.02)
    if resident:
        enter_resident(model)
    return model


def step(model, forward) -> list[torch.Tensor]:
    """The loss, and the gradients of all that is trained."""
    model.zero_grad()
    if isinstance(model.base_model.model, Small):
        loss = forward(X).square().sum()
    else:
        loss = forward(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


CASES = [("spiel", True), ("spiel", False), ("s2ft", True)]


@pytest.mark.parametrize("name, resident", CASES, ids=lambda v: str(v))
def test_updates_reach_one_graph(llama, name, resident) -> None:
    model = adapted(llama, name, resident=resident)
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = None
    step(model, model)  # the views of a support that eager makes and keeps are there from now on
    for _ in range(3):
        found, expected = step(model, compiled), step(model, model)
        for mine, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, eager)
        assert before is None or found[0] != before
        before = found[0]
        optimizer.step()
        sync_resident(model)
    assert graphs.frame_count == 1


def test_a_new_support_reaches_the_graph(llama) -> None:
    model = adapted(llama, "spiel", resident=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    step(model, compiled)
    for layer in sparse_layers(model).values():
        k = layer.delta_values["default"].numel()
        layer.replace_support("default", torch.arange(k), torch.arange(k))
    for mine, eager in zip(step(model, compiled), step(model, model), strict=True):
        torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("where", ["at first", "after a move"])
def test_nothing_has_to_run_before(llama, where) -> None:
    """Beside the base no forward pass of eager has looked where the features lie."""
    model = adapted(llama, "s2ft", resident=False)
    if where == "after a move":
        for layer in sparse_layers(model).values():
            layer.replace_slice("default", layer.s2ft_indices["default"].flip(0).sort().values)
    found = step(model, torch.compile(model, fullgraph=True, backend="eager"))
    for mine, eager in zip(found, step(model, model), strict=True):
        torch.testing.assert_close(mine, eager)


def test_a_loaded_support_reaches_the_graph(llama) -> None:
    """Loading writes into the tensors that the graph knows."""
    model = adapted(llama, "spiel", resident=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    step(model, model)  # makes and keeps views of the first support
    step(model, compiled)
    other = adapted(llama, "spiel", resident=False)
    for layer in sparse_layers(other).values():
        k = layer.delta_values["default"].numel()
        layer.replace_support("default", torch.arange(k) * 2, torch.arange(k))
    model.load_state_dict(other.state_dict())
    for mine, eager in zip(step(model, compiled), step(other, other), strict=True):
        torch.testing.assert_close(mine, eager)
