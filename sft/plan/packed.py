"""A quantised base: what bitsandbytes packs, and in how many bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sft.adapters.layer import SparseLayer
from sft.recipe.schema import QuantizationSpec, Recipe

BLOCK, SCALES = 64, 256  # weights that share a scale, and scales that share one


def packed_weights(recipe: Recipe, model: Any) -> dict[str, int]:
    """Return the bytes that packed weights take, by the name of the parameter.

    Their layers get a forward of their own, so that none is written to.
    """
    spec = recipe.model.quantization
    if spec is None:
        return {}
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        base = module.base_layer if isinstance(module, SparseLayer) else module
        plain = type(base) is nn.Linear and base is not head
        weight = getattr(base, "weight", None)
        if plain and isinstance(weight, Tensor) and not _left_out(name, spec.skip_modules):
            inner = f"{name}.base_layer" if base is not module else name
            found[f"{inner}.weight"] = bytes_of(weight, spec)
            base.forward = base.forward
    return found


def _left_out(name: str, skipped: list[str]) -> bool:
    """Whether a module is an adapter's, or one that the recipe leaves as it is."""
    parts = name.split(".")
    adapter = any(part.startswith(("lora_", "modules_to_save")) for part in parts)
    return adapter or any(part in parts or name.endswith(part) for part in skipped)


def bytes_of(weight: Tensor, spec: QuantizationSpec) -> int:
    """Return the bytes of a packed weight: codes and scales."""
    count = weight.numel()
    if spec.bits == "int8":
        return count + 4 * weight.shape[0]
    scales = -(-count // BLOCK)
    if not spec.double_quant:
        return count // 2 + 4 * scales
    return count // 2 + scales + 4 * -(-scales // SCALES)


def compute_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """Return what products with a packed weight are computed in."""
    spec = recipe.model.quantization
    if spec is None or spec.compute_dtype == "auto":
        return dtype
    found: torch.dtype = getattr(torch, spec.compute_dtype)
    return found
