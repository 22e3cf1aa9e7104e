"""Choose supports by scores accumulated over batches of the training data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sft.adapters.base import DeltaTuner, candidates
from sft.adapters.delta_layer import DeltaLayer
from sft.adapters.select import Strategy, strategy
from sft.kernels.outer import Outer
from sft.kernels.outer_at import rows_per_block


def pending_adapters(model: nn.Module) -> list[str]:
    """Return the adapters whose support is a placeholder until `calibrate` has run."""
    layers = (m for m in model.modules() if isinstance(m, DeltaLayer))
    return sorted({name for layer in layers for name in layer.pending})


def calibrate(model: Any, batches: Iterable[Mapping[str, Any]], adapter: str = "default") -> int:
    """Accumulate gradient scores over batches and choose the adapter's support by them.

    Runs forward and backward in eval mode, so dropout draws nothing, and holds one float32 score
    for each targeted weight meanwhile.

    Args:
        model: a PeftModel whose adapter has a calibrated selection ("gradient", "fisher").
        batches: keyword arguments of the model, labels included; the configuration's
            `calibration_batches` of them are read.
        adapter: its name.

    Returns:
        The number of batches read.

    Raises:
        ValueError: there are no batches, they give no loss, or no gradient reaches a layer.
    """
    tuner: DeltaTuner = model.base_model
    config = tuner.peft_config[adapter]
    layers = tuner.adapted_layers(adapter)
    chosen = strategy(config.selection)
    if not chosen.CALIBRATED:
        raise ValueError(f"selection: got {config.selection!r}, which reads no batches")
    if any(bool(layer.delta_values[adapter].any()) for layer in layers.values()):
        raise ValueError(
            f"calibration: adapter {adapter!r} is trained already; a new support would undo it"
        )
    scores = {name: _Scores(chosen) for name in layers}
    training = model.training
    model.eval()
    for name, layer in layers.items():
        layer.site(adapter).tap = scores[name].add
    try:
        count = _run(model, islice(batches, config.calibration_batches))
    finally:
        for layer in layers.values():
            layer.site(adapter).tap = None
        model.train(training)
        model.zero_grad(set_to_none=True)
    unseen = [name for name in layers if scores[name].total is None]
    if unseen:
        raise ValueError(
            f"calibration: {unseen[0]!r} got no gradient from {count} batches ({len(unseen)} such "
            "modules); leave it out with exclude_modules or choose selection='random'"
        )
    for name, layer in layers.items():
        values = layer.delta_values[adapter]
        found = candidates(layer, name, config, scores[name].total)
        indices = chosen.select(found, values.numel())
        layer.replace_support(adapter, indices, torch.full_like(indices, -1))
        layer.pending.discard(adapter)
    return count


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


def _run(model: Any, batches: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    for batch in batches:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError("calibration: the batches give no loss; they need labels")
        loss.backward()
        count += 1
    if count == 0:
        raise ValueError("calibration: got no batches; pass at least one")
    return count
