"""What a mask is for: fewer trained weights, less noise, at the same number of losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sft.kernels.displace import displace
from sft.kernels.mask import Mask
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.estimate import projected_gradients
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.trained import Trained, trained_set

DIM, UPDATES, SEED = 400, 120, 4


def start_and_target() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and where they should be: the smallest tenth differs, and stays small."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(DIM, generator=generator)
    target = start.clone()
    small = start.abs().argsort()[: DIM // 10]
    target[small] = (torch.rand(DIM // 10, generator=generator) * 2 - 1) * float(
        start[small].abs().max()
    )
    return start, target


def final_loss(mask: Mask | None, lr: float) -> float:
    """Return the loss of a run over that of its start."""
    start, target = start_and_target()
    weight = nn.Parameter(start.clone(), requires_grad=False)
    config = ZerothOrderConfig()
    trained = [Trained("w", weight, 1, mask)]
    optimizer = ZerothOrderOptimizer([{"params": [weight], "lr": lr}], trained, config, SEED)

    def loss(at: torch.Tensor) -> float:
        return float((at.double() - target.double()).square().sum()) / 2

    for _ in range(UPDATES):
        (key,) = optimizer.keys(1)
        sides = [
            loss(displace([weight], [1], [(key, c)], masks=[mask])[0])
            for c in (-config.eps, config.eps)
        ]
        optimizer.propose(projected_gradients(config, sides[:1], sides[1:], None))
        optimizer.step()
    found = loss(weight) / loss(start)
    return found if math.isfinite(found) else math.inf


def test_m10_on_a_sparse_target_the_masked_run_beats_the_dense_one_at_its_best_rate() -> None:
    """A step at rate 1/d leaves 1 - 1/d of a quadratic's loss: d is 400 without, 40 with mask."""
    start, _ = start_and_target()
    held = nn.Parameter(start, requires_grad=False)
    (chosen,) = trained_set([("w", held)], ZerothOrderConfig(sparsity=0.9), SEED)
    dense = min(final_loss(None, scale / DIM) for scale in (0.5, 1, 1.5))
    masked = final_loss(chosen.mask, 5 / DIM)
    # theory: exp(-0.3); with the mask exp(-2.25), but for weights that outgrew the threshold
    assert dense == pytest.approx(math.exp(-0.3), abs=0.06)
    assert masked < 0.5 * dense
