"""Facts of momentum and Adam without gradients: those of torch on g z, in little memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sft.kernels.mask import Random, mask_of
from sft.kernels.noise import noise
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.trained import Trained

SEED = 5


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
def test_state_is_that_of_torchs_optimizers(zo: Any, rule: str, mask: Any, decay: float) -> None:
    shapes = ((300, 257), (7,))  # the first is of several chunks
    parameters, theirs = zo.weights(*shapes), zo.weights(*shapes)
    optimizer = zo.build(parameters, decays=(decay,) * 2, mask=mask, update=rule, queries=2)
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
        zo.run(optimizer, [gradients])
    for t, p in zip(optimizer.trained, theirs, strict=True):
        free = torch.ones_like(p, dtype=torch.bool)
        if t.mask is not None:
            free = mask_of(p, t.id, t.mask)
        torch.testing.assert_close(t.parameter[free], p[free], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_stateful_rules_take_any_layout_and_no_dense_temporary(
    zo: Any, rule: str, largest_tensor: Any
) -> None:
    turned = nn.Parameter(torch.randn(600, 500).t(), requires_grad=False)
    straight = nn.Parameter(turned.detach().clone().contiguous(), requires_grad=False)
    big, small = zo.build([straight], update=rule), zo.build([turned], update=rule)
    zo.run(big, [[0.5]])
    zo.run(small, [[0.5]])
    big.propose([0.25])
    assert largest_tensor(big.step) <= max(4 * straight.numel(), 2**20)
    zo.run(small, [[0.25]])
    assert zo.same([turned.contiguous()], [straight]) and not turned.is_contiguous()
    parameters = zo.weights((2**11, 2**10))
    wide = zo.build(parameters, update=rule)
    zo.run(wide, [[0.5]])
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
def test_dense_state_of_a_whole_model_is_refused(zo: Any, rule: str, moments: int) -> None:
    def make(size: int | None, **changes: Any) -> ZerothOrderOptimizer:
        parameters = zo.weights((100,))
        trained = [Trained("w", parameters[0], 1)]
        config = ZerothOrderConfig(update=rule, **changes)
        group = {"params": parameters, "lr": 1e-3}
        return ZerothOrderOptimizer([group], trained, config, SEED, model_size=size)

    with pytest.raises(ValueError, match=f"update: got '{rule}'.*of 100 trained weights"):
        make(999)
    make(1000)
    make(None)
    zo.run(make(100, dense_state=True), [[0.5]])
    optimizer = make(1000)
    zo.run(optimizer, [[0.5]])
    assert len(optimizer.state[optimizer.trained[0].parameter]) == moments
