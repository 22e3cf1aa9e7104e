"""Where a model reads its trained tensors: inside the module that holds them, or elsewhere."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn import functional

from sft.optim.zeroth_order.reads import owners, watch


class Toy(nn.Module):
    """A tied head, a module that multiplies by another one's weight, values in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.plain = nn.Linear(4, 4)
        self.borrowed = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.values = nn.ParameterDict({"default": nn.Parameter(torch.ones(4))})
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.plain(self.embed(ids)) * self.values["default"]
        assert self.unused.weight.shape == (4, 4)  # reads no value
        return self.head(functional.linear(x, self.borrowed.weight))


def seen():
    model = Toy()
    owned = owners(model, {id(p) for p in model.parameters()})
    return model, owned, watch(owned, lambda: model(torch.tensor([[1, 2]])))


def test_a_tied_weight_has_two_owners_and_each_reads_it_in_its_way() -> None:
    model, owned, reads = seen()
    tied = id(model.embed.weight)
    assert [m for m in owned if any(id(p) == tied for p in owned[m])] == [model.embed, model.head]
    assert (id(model.embed), tied) in reads.looked_up - reads.whole
    assert (id(model.head), tied) in reads.whole - reads.looked_up


def test_reads_outside_the_owner_are_told_apart() -> None:
    model, _, reads = seen()
    assert reads.elsewhere == {id(model.borrowed.weight), id(model.values["default"])}
    assert {p for _, p in reads.whole} >= {id(model.plain.weight), id(model.plain.bias)}


def test_an_accessor_reads_no_values_but_a_transpose_does() -> None:
    model, owned, reads = seen()
    assert id(model.unused.weight) not in reads.anywhere
    transposed = watch(owned, lambda: model.unused.weight.T)
    assert transposed.elsewhere == {id(model.unused.weight)}


def test_modules_come_in_the_order_in_which_they_run() -> None:
    model, _, reads = seen()
    assert reads.order == [model.embed, model.plain, model.head]


def test_an_error_leaves_no_hook_behind() -> None:
    model = Toy()
    owned = owners(model, {id(p) for p in model.parameters()})
    with contextlib.suppress(IndexError):
        watch(owned, lambda: model(torch.tensor([[99]])))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
