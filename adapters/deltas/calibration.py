"""Supports of single weights chosen by gradient scores over batches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sft.adapters.config import SparseConfig
from sft.adapters.deltas.layer import DeltaLayer
from sft.adapters.deltas.mean_outer import shared
from sft.adapters.ranks import ALONE, Ranks
from sft.adapters.select import Strategy, candidates_of, strategy
from sft.kernels.outer import Outer
from sft.kernels.outer_at import rows_per_block


class ScoreCalibration:
    """Holds one float32 score for each targeted weight while batches run.

    Args:
        layers: carry the adapter, by module name.
        adapter: its name.
        config: names a calibrated selection.
    """

    backward = True
    ranks: Ranks = ALONE

    def __init__(self, layers: dict[str, DeltaLayer], adapter: str, config: SparseConfig) -> None:
        self._layers, self._adapter, self._config = layers, adapter, config
        self._strategy = strategy(config.selection)
        self._scores = {name: _Scores(self._strategy) for name in layers}

    def num_batches(self, available: int | None) -> int:
        """Return the configured number."""
        return self._config.calibration_batches

    def open(self) -> None:
        """Tap the gradients of all layers."""
        for name, layer in self._layers.items():
            layer.site(self._adapter).tap = partial(self._add, name)

    def before_batch(self, batch: Mapping[str, Any]) -> None:
        """Nothing to note: padding gets no gradient."""

    def close(self) -> None:
        """Remove the taps."""
        for layer in self._layers.values():
            layer.site(self._adapter).tap = None

    def _add(self, name: str, outer: Outer) -> None:
        self._scores[name].add(shared(outer, self.ranks, name))

    def choose(self, count: int) -> None:
        """Place each layer's support where the strategy finds its best scores."""
        unseen = [name for name, scores in self._scores.items() if scores.total is None]
        if unseen:
            raise ValueError(
                f"calibration: {unseen[0]!r} got no gradient from {count} batches ({len(unseen)} "
                "such modules); leave it out with exclude_modules or choose selection='random'"
            )
        for name, layer in self._layers.items():
            values = layer.trained_values[self._adapter]
            found = candidates_of(layer, name, self._config, self._scores[name].total)
            indices = self._strategy.select(found, values.numel())
            layer.replace_support(self._adapter, indices, torch.full_like(indices, -1))
            layer.pending.discard(self._adapter)


def score_calibration(
    layers: dict[str, Any], adapter: str, config: SparseConfig
) -> ScoreCalibration | None:
    """Return the accumulation that the configured selection asks for, or None if it reads none."""
    if not strategy(config.selection).CALIBRATED:
        return None
    return ScoreCalibration(layers, adapter, config)


class _Scores:
    """Dense (rows * cols,) float32 scores of one layer."""

    def __init__(self, chosen: Strategy) -> None:
        self._chosen = chosen
        self.total: Tensor | None = None

    def add(self, outer: Outer) -> None:
        """Add one backward pass, row block by row block."""
        rows, cols = outer.shape
        step = rows_per_block(cols, 4)
        for start in range(0, rows, step):
            block = outer.block(start, min(start + step, rows)).view(-1)
            if self.total is None:
                self.total = block.new_zeros(rows * cols)
            part = self.total[start * cols : start * cols + block.numel()]
            part += self._chosen.increment(block)
