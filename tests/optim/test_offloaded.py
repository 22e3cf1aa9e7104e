"""A state on the CPU follows its parameters: entries that leave, move, or are of half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sft.optim.move import move_state
from sft.optim.offloaded import OffloadedOptimizer


def pair(size: int = 6):
    """The same parameter twice, with an AdamW on the CPU and one in its place."""
    values = torch.arange(1.0, size + 1)
    away, plain = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    options = {"lr": 0.25, "weight_decay": 0.5}
    optimizers = (
        OffloadedOptimizer(torch.optim.AdamW([away], **options)),
        torch.optim.AdamW([plain], **options),
    )
    return (away, plain), optimizers


def step(parameters, optimizers, scale: float = 1.0) -> None:
    for parameter, optimizer in zip(parameters, optimizers, strict=True):
        parameter.grad = scale * torch.linspace(-1, 1, parameter.numel())
        optimizer.step()


def test_entries_that_leave_take_their_state_along() -> None:
    """The parameter is written to and gets smaller between two steps, then its state follows."""
    parameters, optimizers = pair()
    step(parameters, optimizers)
    source = torch.tensor([4, 0, 3])
    for parameter in parameters:
        parameter.data = parameter.data[source] + 10.0
    away, plain = optimizers
    seeds = {"mean_grad": None, "mean_square": None}
    away.move_state(parameters[0], source, updates=0, **seeds)
    move_state(plain, parameters[1], source, updates=0, **seeds)
    step(parameters, optimizers, 3.0)
    assert parameters[0].shape == (3,)
    assert torch.equal(*parameters)
    # what left does not come back with the stand-in
    stand_in = away.inner.param_groups[0]["params"][0]
    assert torch.equal(stand_in, parameters[0])
    assert stand_in.data_ptr() != parameters[0].data_ptr()


def test_a_shape_that_changes_keeps_the_width_of_a_master() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = OffloadedOptimizer(torch.optim.SGD([parameter], lr=1.0))
    parameter.data = parameter.data[:2].clone()
    for _ in range(8):
        parameter.grad = torch.full_like(parameter, 2.0**-12)
        optimizer.step()
    master = optimizer.inner.param_groups[0]["params"][0]
    assert (master.dtype, master.shape) == (torch.float32, (2,))
    assert master.tolist() == 2 * [1 - 8 * 2.0**-12]


def test_options_and_the_closure_reach_the_optimizer_that_steps() -> None:
    parameters, optimizers = pair()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.125
    step(parameters, optimizers)
    assert torch.equal(*parameters)
    parameters[0].grad = None
    assert optimizers[0].step(lambda: 7.0) == 7.0
    assert torch.equal(*parameters), "no gradient, no step"


def test_one_that_has_stepped_is_refused() -> None:
    parameters, optimizers = pair()
    step(parameters, optimizers)
    with pytest.raises(ValueError, match=r"^inner: got AdamW with state, allowed is one that has"):
        OffloadedOptimizer(optimizers[1])
