"""A file that does not fit its base is refused, whole and before anything is copied."""

from __future__ import annotations

from torch import Tensor, nn

from sft.adapters.layer import SparseLayer, sparse_layers


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
    layers = sparse_layers(model)
    for name, layer in layers.items():
        if adapter in layer.trained_values:
            expected |= _check_layer(name, layer, adapter, tensors)
    extra = sorted(key for key in tensors if f".{prefix}" in key and key not in expected)
    if extra:
        raise ValueError(
            f"adapter file: {extra[0]!r} has no place in this model ({len(extra)} such entries); "
            "the adapter was made for another model or other target_modules"
        )
    for layer in layers.values():
        layer.pending.discard(adapter)


def _check_layer(
    name: str, layer: SparseLayer, adapter: str, tensors: dict[str, Tensor]
) -> set[str]:
    """Check one layer's entries; return their keys."""
    keys = {part: f"{name}.{part}.{adapter}" for part in layer.file_parts(adapter)}
    for key in keys.values():
        if key not in tensors:
            raise ValueError(
                f"adapter file: {key.removesuffix(f'.{adapter}')!r} is missing; the adapter was "
                "made for another model or other target_modules, or the file is damaged"
            )
    parts = {part: tensors[key] for part, key in keys.items()}
    layer.check_file(adapter, parts, f"adapter file: {name}")
    return set(keys.values())
