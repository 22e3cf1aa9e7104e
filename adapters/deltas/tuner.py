"""The tuner of methods whose support is single weights: budget, selection, placement."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sft.adapters.base import SparseTuner
from sft.adapters.budget import allocate, allocate_reference
from sft.adapters.calibration import Calibration
from sft.adapters.config import SparseConfig
from sft.adapters.deltas.calibration import score_calibration
from sft.adapters.deltas.layer import DeltaLayer, DeltaLinear
from sft.adapters.geometry import Kind, layer_kind
from sft.adapters.layer import SparseLayer, sparse_layers
from sft.adapters.select import candidates_of, strategy


class DeltaTuner(SparseTuner):
    """A PEFT tuner whose layers train deltas at a support of single weights."""

    prefix = "delta_"
    tuner_layer_cls = DeltaLayer
    kinds = (Kind.LINEAR, Kind.CONV1D, Kind.EMBEDDING)

    def new_layer(self, config: SparseConfig, target: nn.Module, name: str) -> SparseLayer:
        """Return a DeltaLayer, over a linear layer of the class whose name says so."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        owner = DeltaLayer if layer_kind(base) is Kind.EMBEDDING else DeltaLinear
        return owner(target, reference=config.reference)

    def attach(
        self, adapter: str, config: Any, targets: dict[str, SparseLayer], *, on_meta: bool
    ) -> None:
        """Share the budget out over the targets and choose each support."""
        counts = self.counts(config, targets)
        for name, layer in targets.items():
            assert isinstance(layer, DeltaLayer)
            _attach(layer, name, adapter, config, counts[name], on_meta=on_meta)

    def counts(self, config: Any, targets: dict[str, SparseLayer]) -> dict[str, int]:
        """Return the number of weights of each target: its share of the budget."""
        shapes = {name: layer.shape for name, layer in targets.items()}
        if config.reference and config.density is not None:
            return allocate_reference(config.density, _base_numel(self.model), shapes)
        return allocate(config.budget().total(shapes), shapes)

    def calibration(self, adapter_name: str) -> Calibration | None:
        """Return the accumulation of gradient scores that the selection asks for."""
        layers, config = self.adapted_layers(adapter_name), self.peft_config[adapter_name]
        return score_calibration(layers, adapter_name, config)


def _attach(
    layer: DeltaLayer, name: str, adapter: str, config: SparseConfig, k: int, *, on_meta: bool
) -> None:
    """Choose a support of k positions and add the adapter to the layer."""
    if on_meta:
        indices = torch.empty(k, dtype=torch.int64, device="meta")
    else:
        chosen = strategy(config.selection)
        if chosen.CALIBRATED:
            layer.pending.add(adapter)
            chosen = strategy("random")
        indices = chosen.select(candidates_of(layer, name, config), k)
    dtype = layer.trained_dtype()
    values = torch.zeros(k, dtype=dtype, device=indices.device)
    if not config.init_weights and not on_meta:
        values = torch.randn(k, dtype=dtype)
    layer.add_adapter(
        adapter,
        indices,
        values,
        saved_inputs=config.saved_inputs,
        inference_mode=config.inference_mode,
    )


def _base_numel(model: nn.Module) -> int:
    own = {
        id(parameter)
        for layer in sparse_layers(model).values()
        for part in layer.adapter_layer_names
        for parameter in getattr(layer, part).parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in own)
