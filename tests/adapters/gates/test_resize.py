"""A parameter that gets smaller: autograd, hooks and optimizers go on with the same object."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sft.adapters.gates.resize import resize_


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("alive", [False, True], ids=["graph gone", "graph alive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("rows", [3, 0])
def test_backward_and_hooks_after_a_resize(checkpointed, alive, dtype, rows) -> None:
    parameter = nn.Parameter(torch.randn(5, 4).to(dtype))
    seen, accumulated = [], []
    parameter.register_hook(lambda g: seen.append(tuple(g.shape)))
    parameter.register_post_accumulate_grad_hook(lambda p: accumulated.append(tuple(p.grad.shape)))

    x = torch.ones(2, 4, dtype=dtype, requires_grad=True)

    def loss():
        def product(x):
            return (x @ parameter.t()).float().square().sum()

        return checkpoint(product, x, use_reentrant=False) if checkpointed else product(x)

    first = loss()
    first.backward(retain_graph=alive)
    if not alive:
        del first
    kept = parameter.detach()[:rows].clone()
    resize_(parameter, kept)
    assert parameter.grad is None and parameter.requires_grad and parameter.is_leaf
    assert parameter.dtype == dtype
    loss().backward()
    assert parameter.grad.shape == (rows, 4)
    assert seen == accumulated == [(5, 4), (rows, 4)]
    assert torch.equal(parameter, kept)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_optimizers_step_what_got_smaller(options) -> None:
    parameters = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 5))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, **options)
    for rows in (None, 2, 0):
        if rows is not None:
            for dim, parameter in enumerate(parameters):
                resize_(parameter, parameter.detach().narrow(dim, 0, rows).clone())
                state = optimizer.state[parameter]
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = state[key].narrow(dim, 0, rows).clone()
        sum(p.square().sum() for p in parameters).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        optimizer.zero_grad()
        assert rows == 0 or not torch.equal(before[0], parameters[0])
