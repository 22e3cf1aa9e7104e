"""Sum adapters of slices: exact where they train different features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sft.adapters.slices.layer import SliceLinear


def fuse(
    layers: Iterable[SliceLinear],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    *,
    saved_inputs: str = "full",
) -> None:
    """Give each layer that carries one of the adapters a new one: the weighted sum of them.

    Args:
        layers: of the model.
        adapters: what is summed.
        weights: a factor for each.
        name: the new adapter.
        saved_inputs: in which form its inputs are kept; see `sft.kernels.kept`.
    """
    for layer in layers:
        parts = [
            (layer.support(adapter).long(), layer.s2ft_values[adapter].detach() * weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if adapter in layer.s2ft_values
        ]
        if parts:
            features, values = add_slices(parts)
            layer.add_adapter(name, features, saved_inputs=saved_inputs)
            layer.replace_slice(name, features, values)


def add_slices(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the features of all parts, ascending, and the sum of their deltas.

    Args:
        parts: (s,) features and (s, line) deltas of each; where they share no feature the deltas
            are copied, so the sum is exact.
    """
    indices = torch.cat([where for where, _ in parts])
    features, slot = torch.unique(indices, return_inverse=True)
    rows = torch.cat([values for _, values in parts])
    summed = rows.new_zeros(len(features), rows.shape[1])
    return features, summed.index_add_(0, slot, rows)
