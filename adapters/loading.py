"""A file that does not fit its base is refused, whole and before anything is copied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sft.adapters.delta_layer import DeltaLayer
from sft.adapters.support import check_indices, fingerprint


def check_adapter_file(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor], prefix: str
) -> None:
    """Check the tensors of an adapter file against the layers that are to take them.

    Args:
        model: holds the layers, which carry the adapter already.
        adapter: its name.
        tensors: by key of the model's state dict.
        prefix: what the names of a method's tensors start with.

    Raises:
        ValueError: an entry is missing, extra, misshapen, of another kind, unsorted or out of
            range, or was made for another base weight.
    """
    expected: set[str] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, DeltaLayer) or adapter not in layer.delta_values:
            continue
        parts = {part: f"{name}.delta_{part}.{adapter}" for part in ("values", "indices", "base")}
        for key in parts.values():
            if key not in tensors:
                raise ValueError(
                    f"adapter file: {_shown(key, adapter)!r} is missing; the adapter was made for "
                    "another model or other target_modules, or the file is damaged"
                )
        expected.update(parts.values())
        _check_layer(layer, adapter, {part: tensors[key] for part, key in parts.items()}, name)
    extra = sorted(key for key in tensors if f".{prefix}" in key and key not in expected)
    if extra:
        raise ValueError(
            f"adapter file: {extra[0]!r} has no place in this model ({len(extra)} such entries); "
            "the adapter was made for another model or other target_modules"
        )
    for layer in model.modules():
        if isinstance(layer, DeltaLayer):
            layer.pending.discard(adapter)


def _check_layer(layer: DeltaLayer, adapter: str, parts: dict[str, Tensor], name: str) -> None:
    wanted = tuple(layer.delta_values[adapter].shape)
    for part in ("values", "indices"):
        if tuple(parts[part].shape) != wanted:
            raise ValueError(
                f"adapter file: {name}.delta_{part} holds {tuple(parts[part].shape)} entries, its "
                f"adapter_config.json gives {wanted} for a weight of {layer.shape}"
            )
    values, base = parts["values"], parts["base"]
    if not values.is_floating_point():
        raise ValueError(
            f"adapter file: {name}.delta_values is {values.dtype}, allowed are float dtypes"
        )
    if base.dtype != torch.int64 or base.numel() != 1:
        raise ValueError(
            f"adapter file: {name}.delta_base holds {base.dtype} {tuple(base.shape)}, allowed is "
            "one torch.int64; the file is damaged"
        )
    check_indices(parts["indices"], layer.shape, f"adapter file: {name}.delta_indices")
    made_for, found = int(base), fingerprint(layer.get_base_layer().weight)
    if made_for and found and made_for != found:
        raise ValueError(
            f"adapter file: {name} was trained on another base weight of shape {layer.shape} "
            f"(fingerprint {made_for:016x}, this base has {found:016x}); load it on its own base"
        )


def _shown(key: str, adapter: str) -> str:
    return key.removesuffix(f".{adapter}")
