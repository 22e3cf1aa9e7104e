"""Where to train: one file a strategy under `selection/`, found by its name."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

import sft.adapters.selection as family
from sft.kernels.topk import StreamingTopK

if TYPE_CHECKING:
    from sft.adapters.config import SparseConfig
    from sft.adapters.layer import SparseLayer

ORDERS = ("largest", "smallest")


@dataclass(frozen=True)
class Candidates:
    """What a strategy may look at to choose positions of one matrix.

    Args:
        shape: (rows, cols).
        read: returns the dense (rows, cols) weight; called only by strategies that need it.
        scores: (rows * cols,) accumulated over calibration batches, or None.
        largest: prefer large scores; False prefers small ones.
        generator: on the CPU, seeded by (seed, matrix name): the same on every device and rank.
    """

    shape: tuple[int, int]
    read: Callable[[], Tensor]
    scores: Tensor | None
    largest: bool
    generator: torch.Generator

    def best(self, scores: Tensor, k: int) -> Tensor:
        """Return the k positions of best score, ascending; ties go to the lowest position."""
        best = StreamingTopK(k)
        flat = scores.flatten()
        for start in range(0, flat.numel(), _CHUNK):
            chunk = flat[start : start + _CHUNK].float()
            best.push(chunk if self.largest else -chunk, start)
        return best.positions()


_CHUNK = 2**22


class Strategy(Protocol):
    """The module interface of a strategy.

    `CALIBRATED` tells whether scores must be accumulated over batches first; such a module also has
    `increment(gradient) -> Tensor`, what one batch adds to the scores.
    """

    CALIBRATED: bool

    def select(self, candidates: Candidates, k: int) -> Tensor:
        """Return k distinct positions, ascending."""

    def increment(self, gradient: Tensor) -> Tensor:
        """Return what a block of one batch's gradient adds to the scores."""


def strategy_names() -> list[str]:
    """Return the names of all strategies on disk."""
    return sorted(module.name for module in pkgutil.iter_modules(family.__path__))


def strategy(name: str) -> Strategy:
    """Return the strategy of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in strategy_names():
        raise ValueError(f"selection: got {name!r}, allowed are {', '.join(strategy_names())}")
    return cast(Strategy, importlib.import_module(f"{family.__name__}.{name}"))


def seeded(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator that depends on the seed and the names alone."""
    content = "\0".join(map(str, (seed, *names))).encode()
    key = int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1
    return torch.Generator("cpu").manual_seed(key)


def candidates_of(
    layer: SparseLayer, name: str, config: SparseConfig, scores: Tensor | None = None
) -> Candidates:
    """Return what a selection strategy may look at for this layer.

    Args:
        layer: the layer.
        name: its name in the base model.
        config: order and seed.
        scores: (rows * cols,) from calibration, or None.
    """
    return Candidates(
        shape=layer.shape,
        read=layer.pretrained_weight,
        scores=scores,
        largest=config.selection_order == "largest",
        generator=seeded(config.seed, "select", name),
    )
