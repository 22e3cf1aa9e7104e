"""By what factor backward's gradients exceed those that are applied, as every engine sees it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sft.adapters.ranks import ALONE
from sft.engines.deepspeed_scale import DeepSpeedScale
from sft.engines.shard_scale import ShardScale
from sft.engines.zero_shards import Fragment
from sft.gradient_scale import GradientScale


def parameters(count=2, size=4):
    return [nn.Parameter(torch.zeros(size)) for _ in range(count)]


def backward(held, *gradients):
    """Add gradients to the parameters, the first one first; None reaches nothing."""
    for parameter, gradient in zip(held, gradients, strict=True):
        if gradient is not None:
            (parameter * torch.tensor(gradient)).sum().backward()


def scaled(held, factor):
    for parameter in held:
        if parameter.grad is not None:
            parameter.grad *= factor


FIRST, SECOND = [-1.0, -8.0, 0.0, 0.0], [4.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("owner", [GradientScale, ShardScale])
def test_the_factor_of_an_update_and_of_the_next(owner) -> None:
    held = parameters()
    scale = owner(held, ALONE)
    for factor in (0.25, 4.0):
        for parameter in held:
            parameter.grad = None
        backward(held, FIRST, SECOND)
        backward(held, FIRST, SECOND)  # of a second micro-batch
        scaled(held, factor)
        assert scale.read() == 1 / factor
    held[0].grad = held[1].grad = None
    backward(held, None, SECOND)  # whichever is reached first is probed anew
    scaled(held, 0.5)
    assert scale.read() == 2.0
    scale.close()
    backward(held, FIRST, SECOND)
    scaled(held, 0.5)
    assert scale.read() == 1.0, "it listens no more"


@pytest.mark.parametrize("owner", [GradientScale, ShardScale])
def test_nothing_scaled_is_exactly_one(owner) -> None:
    held = parameters()
    scale = owner(held, ALONE)
    backward(held, [0.1, 0.3, 0.7, 0.0], SECOND)
    assert scale.read() == 1.0
    assert scale.read() == 1.0, "of an update without backward"
    backward(held, FIRST, SECOND)
    held[0].grad = held[1].grad = None  # whoever took them
    assert scale.read() == 1.0


@pytest.mark.parametrize("applied", [0.0, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("owner", [GradientScale, ShardScale])
def test_what_says_nothing_is_one(owner, applied) -> None:
    held = parameters()
    scale = owner(held, ALONE)
    backward(held, FIRST, SECOND)
    for parameter in held:
        parameter.grad.fill_(applied)
    assert scale.read() == 1.0
    for parameter in held:
        parameter.grad = None
    backward(held, 4 * [applied], 4 * [applied])
    for parameter in held:
        parameter.grad.fill_(1.0)
    assert scale.read() == 1.0


@pytest.mark.parametrize("factor", [1.0, 0.125], ids=str)
def test_ranks_compare_the_mean_of_their_gradients(together, factor) -> None:
    """An entry that is large on one rank may be 0 in the mean: it would say nothing."""
    gradients = [[9.0, 1.0, 0.0, 0.0], [-9.0, 3.0, 0.0, 0.0]]

    def part(seat):
        held = parameters(1)
        scale = GradientScale(held, seat)
        backward(held, gradients[seat.rank])
        held[0].grad = factor * seat.mean(held[0].grad)  # as DDP does, then clipping
        return scale.read()

    assert together(part) == 2 * [1 / factor]


def test_ranks_without_a_gradient_wait_for_nobody(together) -> None:
    assert together(lambda seat: GradientScale(parameters(), seat).read()) == [1.0, 1.0]


def test_ranks_that_probe_different_parameters_end_with_an_error(together) -> None:
    def part(seat):
        held = parameters()
        scale = GradientScale(held, seat)
        backward(held, *([FIRST, None] if seat.rank else [None, FIRST]))
        return scale.read()

    with pytest.raises(RuntimeError, match=r"^the parameter that backward reaches first: differs"):
        together(part)


def test_ranks_with_shards_take_one_answer(together) -> None:
    """The first rank holds no entries, or none that tells; all take the factor of the second."""

    def part(seat):
        held = [nn.Parameter(torch.zeros(0 if seat.rank == 0 else 4)), *parameters(1)]
        scale = ShardScale(held[: 1 + seat.rank], seat)
        backward(held, [] if seat.rank == 0 else FIRST, SECOND)
        scaled(held, 0.25 if seat.rank == 1 else 0.0)
        return scale.read()

    assert together(part, 3)[:2] == [4.0, 4.0]


# -- DeepSpeed ----------------------------------------------------------------------------------


def test_gradients_are_noted_when_deepspeed_steps() -> None:
    """After that they are gone: its step is part of backward."""
    held = parameters()
    stock = torch.optim.SGD(held, lr=0.0)
    scale = DeepSpeedScale(held, ALONE, stock)
    for factor in (0.5, 2.0):
        backward(held, FIRST, SECOND)
        scaled(held, factor)
        stock.step()
        stock.zero_grad(set_to_none=False)
        assert scale.read() == 1 / factor
    stock.step()
    assert scale.read() == 1.0, "nothing was probed"
    backward(held, SECOND, FIRST)
    assert scale.read() == 1.0, "it did not step, and of another update nothing is left"
    scale.close()
    backward(held, FIRST, SECOND)
    scaled(held, 0.5)
    stock.step()
    assert scale.read() == 1.0


def test_ranks_note_the_entries_that_they_step(together) -> None:
    """The probe's largest entry lies on one rank, in the second of its flat vectors."""

    def part(seat):
        held = parameters(1)
        flats = [nn.Parameter(torch.zeros(6)) for _ in range(2)]
        mine = Fragment(flats[1], start=3, first=2 * seat.rank, size=2)
        stock = torch.optim.SGD(flats, lr=0.0)
        scale = DeepSpeedScale(held, seat, stock, lambda _: mine)
        backward(held, FIRST)
        whole = 0.25 * seat.mean(held[0].grad)
        for flat in flats:  # it steps one flat vector after another
            flat.grad = torch.full_like(flat, 77.0)
            if flat is mine.flat:
                flat.grad[3:5] = whole[2 * seat.rank : 2 * seat.rank + 2]
            stock.step()
            flat.grad = None
        return [scale.read(), scale.read()]

    assert together(part) == 2 * [[4.0, 1.0]]


def test_a_skipped_update_has_no_factor() -> None:
    from sft.engines.plain import PlainEngine

    held = parameters()
    wrapper = SimpleNamespace(optimizer=torch.optim.SGD(held, lr=0.0), step_was_skipped=False)
    engine = PlainEngine(wrapper)
    assert engine.gradient_scale() == 1.0, "not watched"
    engine.watch(iter(held))
    backward(held, FIRST, SECOND)
    scaled(held, 0.5)
    assert engine.gradient_scale() == 2.0
    wrapper.step_was_skipped = True
    backward(held, FIRST, SECOND)
    assert engine.gradient_scale() == 0.0
    engine.close()
    assert all(not parameter._backward_hooks for parameter in held)
