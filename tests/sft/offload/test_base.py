"""What backward reads of weights that come and go, and what is written to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sft.adapters.gathered import gathered
from sft.offload.base import OffloadedBase

SIZE = 64


class Reused(nn.Linear):
    """A layer that remembers where its weight lay when it ran."""

    memory: torch.Tensor

    def forward(self, x):
        self.memory = self.weight.detach()
        return super().forward(x)


class Model(nn.Module):
    """Trains a gain on an activation that takes the memory of a weight that has gone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Reused(SIZE, SIZE, bias=False).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(SIZE, SIZE))

    def forward(self, x):
        made = self.first(x).sin()
        activation = self.first.memory.copy_(made) if self.training else made
        return (activation * self.gain).square().sum()


def gradient(model, x):
    model.gain.grad = None
    model(x).backward()
    return model.gain.grad


@pytest.fixture
def offloaded(tmp_path):
    model = Model()
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    wanted = gradient(model.eval(), x)
    base = OffloadedBase(model, torch.device("cpu"), tmp_path)
    yield model, base, x, wanted
    base.close()


def test_memory_of_a_weight_that_has_gone_is_no_longer_that_weight(offloaded) -> None:
    """Else backward would read the weight where forward had put an activation."""
    model, _, x, wanted = offloaded
    assert model.first.weight.numel() == 0
    assert torch.equal(gradient(model.train(), x), wanted)


def test_a_weight_is_read_again_in_backward_and_not_kept(offloaded) -> None:
    model, base, x, _ = offloaded
    reads, fetch = [], base._feed.fetch
    base._feed.fetch = lambda key: reads.append(key) or fetch(key)
    x = x.clone().requires_grad_()
    loss = model.eval()(x)
    assert len(reads) == 1
    loss.backward()
    assert len(reads) == 2
    base.close()
    again = x.detach().clone().requires_grad_()
    model(again).backward()
    assert torch.equal(x.grad, again.grad)


def test_what_is_written_inside_a_block_stays_and_what_is_read_is_not_written(offloaded) -> None:
    model, base, _, _ = offloaded
    weight = model.first.weight
    writes, put = [], base._store.put
    base._store.put = lambda key, tensor: writes.append(key) or put(key, tensor)
    with gathered([weight, model.gain]):
        before = weight.detach().clone()
        assert weight.shape == (SIZE, SIZE)
    assert weight.numel() == 0 and writes == []
    with gathered([weight]), torch.no_grad():
        weight.add_(1.0)
    assert weight.numel() == 0 and len(writes) == 1
    base.close()
    assert torch.equal(weight, before + 1.0)


def test_a_weight_stays_until_the_last_who_uses_it_has_gone(offloaded) -> None:
    model, _, _, _ = offloaded
    weight = model.first.weight
    with gathered([weight]):
        with gathered([weight]):
            assert weight.numel() == SIZE * SIZE
        assert weight.numel() == SIZE * SIZE
    assert weight.numel() == 0
