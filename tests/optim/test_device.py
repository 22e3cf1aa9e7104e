"""The optimizers as they run on a GPU, interpreted here: values and state after some updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from without_gpu.interpreter import interpreted

from sft.kernels.gather import gather
from sft.kernels.sm3 import Positions
from sft.kernels.write import Home
from sft.optim.adamw import SparseAdamW
from sft.optim.move import move_state
from sft.optim.prox import attach
from sft.optim.sm3 import SM3

SIZES = (5, 1500, 1)


@dataclass
class Penalty:
    parameters: list[Tensor] = field(default_factory=list)
    strength: float = 1.0
    rule: str = "soft"
    times_lr: bool = True


class Homes:
    """A bfloat16 weight for each parameter."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.found: dict[int, Home] = {}
        self.written: list[int] = []
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(i)
            weight = torch.randn(2 * p.numel(), generator=generator).bfloat16()
            at = torch.randperm(2 * p.numel(), generator=generator)[: p.numel()].sort().values
            self.found[id(p)] = Home(weight, at.int(), gather(weight, at))

    def find(self, parameter: Tensor) -> Home | None:
        return self.found[id(parameter)]

    def wrote(self, parameter: Tensor) -> None:
        self.written.append(id(parameter))


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(k, generator=torch.manual_seed(k))) for k in SIZES]


def train(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    """Three updates, the second after a reselection."""
    for seed in range(3):
        generator = torch.manual_seed(seed)
        for p in trained:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        if not seed:
            source = torch.arange(1500).roll(3)
            source[::7] = -1
            means = {"mean_grad": torch.full((1500,), 0.1), "mean_square": torch.ones(1500)}
            move_state(optimizer, trained[1], source, **means, updates=2)


def close(found: list[Any], wanted: list[Any]) -> None:
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("reference", [False, True])
def test_adamw_with_homes_and_thresholds(reference: bool) -> None:
    outcomes = []
    for on_device in (False, True):
        trained = params()
        homes = Homes(trained)
        optimizer = SparseAdamW(
            trained, lr=0.05, weight_decay=0.1, reference=reference, homes=homes
        )
        attach(optimizer, [Penalty(trained[:1])])
        if on_device:
            with interpreted():
                train(optimizer, trained)
        else:
            train(optimizer, trained)
        state = [v for p in trained for _, v in sorted(optimizer.state[p].items())]
        outcomes.append([p.detach() for p in trained] + state)
        for p, home in zip(trained, homes.found.values(), strict=True):
            sums = (home.originals + p.detach()).bfloat16()
            assert torch.equal(gather(home.weight, home.indices), sums)
        assert homes.written == [id(p) for p in trained] * 3
        assert all(p._version >= 3 for p in trained)  # what tells that values moved
    close(*outcomes)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sm3(momentum: float) -> None:
    shapes = {5: (3, 4), 1500: (60, 70), 1: (1, 1)}

    def places(p: nn.Parameter) -> Positions:
        o, i = shapes[p.numel()]
        flat = torch.randperm(o * i, generator=torch.manual_seed(0))[: p.numel()].sort().values
        return Positions(flat // i, flat % i, (o, i))

    outcomes = []
    for on_device in (False, True):
        trained = params()
        optimizer = SM3(trained, lr=0.05, momentum=momentum, weight_decay=0.1, positions=places)
        if on_device:
            with interpreted():
                train(optimizer, trained)
        else:
            train(optimizer, trained)
        state = [v for p in trained for _, v in sorted(optimizer.state[p].items())]
        outcomes.append([p.detach() for p in trained] + state)
    close(*outcomes)
