"""Merge an adapter that was trained over packed weights, and say what error that makes.

Trained was W = dequantised(base) + delta, in float32. Three ways to keep it:

    dequantize: W, rounded once to the model's dtype: what was trained, in a model of full size.
    requantize: W packed as the base is: small again, and much of a small delta is rounded away.
    reference: the delta on the weights that were packed: what the delta learnt to mend of the
        packing is added to weights that never had it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.adapters.quantized import dequantised, packed_modules, packing, requantised
from sft.errors import UserError
from sft.export.merged import (
    Batches,
    export_merged,
    in_dtype,
    logits_of,
    trained_logits,
    verify_merged,
)
from sft.export.shards import SHARD

MODES = ("dequantize", "requantize", "reference")
ERROR_FILE = "merge_error.json"


@dataclass(frozen=True)
class Deviation:
    """How far numbers are from what was trained: the largest |difference|, and their mean."""

    largest: float
    mean: float


@dataclass(frozen=True)
class MergeError:
    """What merging into or beside packed weights changed.

    Args:
        mode: "dequantize", "requantize" or "reference".
        layers: of the weights that were packed, by module name.
        logits: on some examples, against the trained model's.
    """

    mode: str
    layers: dict[str, Deviation]
    logits: Deviation

    def lines(self) -> list[str]:
        """Say it in two lines."""
        worst = max(self.layers, key=lambda name: self.layers[name].largest)
        mean = sum(found.mean for found in self.layers.values()) / len(self.layers)
        return [
            f"{self.mode}: |weight error| of {len(self.layers)} packed layers: mean {mean:.3g}, "
            f"at most {self.layers[worst].largest:.3g} ({worst})",
            f"{self.mode}: |logit error| against the trained model: mean {self.logits.mean:.3g}, "
            f"at most {self.logits.largest:.3g}",
        ]

    def write(self, folder: Path) -> None:
        """Write all of it, layer by layer, into a folder."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        (folder / ERROR_FILE).write_text(text, encoding="utf-8")


def merge_quantized(
    model: Any,
    mode: str,
    batches: Batches,
    *,
    dtype: torch.dtype | None = None,
    reference: Callable[[], Any] | None = None,
) -> tuple[Any, MergeError]:
    """Merge a model whose base is packed; it is spent, use what is returned.

    Args:
        model: a PeftModel over a packed base, or that base alone.
        mode: see the head of this file.
        batches: examples on which logits are compared.
        dtype: of dense weights, default: that of the model's other weights.
        reference: loads the base as it was before it was packed, for mode "reference".

    Returns:
        A stock model, packed with "requantize", and what merging changed.

    Raises:
        UserError: the mode is unknown, the method has no delta, or there is no reference.
    """
    if mode not in MODES:
        raise UserError(f"quantized: got {mode!r}; expected one of {', '.join(MODES)}")
    if mode == "requantize" and dtype is not None:
        raise UserError("dtype: is of dense weights; leave it out with quantized=requantize")
    expected = trained_logits(model, batches)
    target = dtype or model.dtype
    if mode == "reference":
        merged, layers = _onto_reference(model, reference, target)
    else:
        layers = _merge_in_place(model, None if mode == "requantize" else target)
        merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        if mode == "dequantize":
            merged = in_dtype(_unmarked(merged), target)
    found = logits_of(merged, batches)
    differences = [(a - b).abs() for a, b in zip(found, expected, strict=True)]
    logits = _deviation(torch.cat([d.flatten() for d in differences]))
    return merged, MergeError(mode, layers, logits)


def export_quantized(
    model: Any,
    tokenizer: Any,
    folder: Path,
    mode: str,
    batches: Batches,
    *,
    verify: bool = True,
    dtype: torch.dtype | None = None,
    reference: Callable[[], Any] | None = None,
    max_shard_size: str = SHARD,
) -> tuple[float | None, MergeError]:
    """Merge, write the stock model with its errors beside it, reload it and compare logits.

    Args:
        model: as for `merge_quantized`.
        tokenizer: saved beside the weights.
        folder: where to write; replaced when it exists.
        mode: as for `merge_quantized`.
        batches: as for `merge_quantized`.
        verify: reload the folder.
        dtype: as for `merge_quantized`.
        reference: as for `merge_quantized`.
        max_shard_size: of a file of weights.

    Returns:
        The largest |logit difference| between the folder and what was merged, and what merging
        changed.
    """
    merged, error = merge_quantized(model, mode, batches, dtype=dtype, reference=reference)
    expected, found = logits_of(merged, batches), []

    def check(path: Path) -> None:
        error.write(path)
        if verify:
            found.append(verify_merged(path, batches, expected))

    export_merged(merged, tokenizer, folder, check=check, max_shard_size=max_shard_size)
    return (found[0] if found else None), error


@torch.no_grad()
def trained_weight(module: Any) -> Tensor:
    """Return what a layer over a packed weight multiplies with: (out, in) float32, base and deltas.

    Raises:
        UserError: an active adapter has no delta.
    """
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = dequantised(base)
    for name in _active(module):
        if hasattr(module, "merge_region"):
            region = module.merge_region(name)
            region.write(weight, module.merged_values(name, region.read(weight)))
        else:
            weight = weight + module.get_delta_weight(name).to(weight)
    return weight


def _active(module: Any) -> list[str]:
    """Return the adapters that a layer adds to its base.

    Raises:
        UserError: one of them is no sum of base and delta.
    """
    if not hasattr(module, "get_base_layer") or module.disable_adapters:
        return []
    names = [
        n for n in module.active_adapters if n in getattr(module, module.adapter_layer_names[0])
    ]
    odd = any(n in getattr(module, "lora_variant", {}) for n in names)
    if names and (odd or not hasattr(module, "get_delta_weight")):
        raise UserError(
            f"quantized: a {type(module).__name__} adds no plain delta to packed weights; take "
            "quantized=reference, which lets PEFT merge it into the weights that were packed"
        )
    return names


def _packed_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers over packed weights: those of adapters, and packed modules without one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inside: tuple[str, ...] = ()
    for name, module in list(base.named_modules()):
        if inside and name.startswith(inside):
            continue
        if hasattr(module, "get_base_layer"):
            inside = (*inside, f"{name}.")
            if packing(module.get_base_layer()) is not None:
                yield name, module
        elif packing(module) is not None:
            yield name, module


@torch.no_grad()
def _merge_in_place(model: Any, dtype: torch.dtype | None) -> dict[str, Deviation]:
    """Put what was trained in the place of each layer: dense in a dtype, or packed with None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = list(_packed_layers(model))
    for _, layer in layers:
        _active(layer)  # what is refused is refused before a layer is touched
    errors = {}
    for name, layer in layers:
        packed = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        weight = trained_weight(layer)
        if dtype is None:
            if packed is not layer:
                packed.weight = requantised(packed, weight)
            kept, new = dequantised(packed), packed
        else:
            new = _dense(packed, weight.to(dtype))
            kept = weight.to(dtype).float()
        errors[name] = _deviation((kept - weight).abs())
        base.set_submodule(name, new)
    return errors


def _onto_reference(
    model: Any, load: Callable[[], Any] | None, dtype: torch.dtype
) -> tuple[Any, dict[str, Deviation]]:
    """Merge the adapter into the weights that were packed, and compare with what was trained."""
    base = None if load is None else load()
    if base is None or any(True for _ in packed_modules(base)):
        raise UserError(
            "quantized: got reference, but there is no base in 16 or 32 bit to merge into; name "
            "one, or take dequantize"
        )
    for name, layer in _packed_layers(model):
        packed = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        if not isinstance(base.get_submodule(name), nn.Linear):
            raise UserError(
                f"quantized: got reference, but {name} is a {type(packed).__name__} where the "
                f"adapter was trained and a {type(base.get_submodule(name)).__name__} in the "
                "reference, whose weights lie otherwise; take dequantize"
            )
    merged = _adapters_onto(base, model) if hasattr(model, "peft_config") else base
    merged = in_dtype(merged, dtype)
    errors = {}
    for name, layer in _packed_layers(model):
        kept = merged.get_submodule(name).weight
        errors[name] = _deviation((kept.float() - trained_weight(layer).to(kept.device)).abs())
    return merged, errors


def _adapters_onto(base: Any, model: Any) -> Any:
    """Merge the active adapters of a model into another base."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        names = list(model.active_adapters)
        places = [Path(folder) / ("" if name == "default" else name) for name in names]
        adapted = PeftModel.from_pretrained(base, str(places[0]), adapter_name=names[0])
        for name, place in zip(names[1:], places[1:], strict=True):
            adapted.load_adapter(str(place), adapter_name=name)
    return adapted.merge_and_unload(adapter_names=names)


def _dense(packed: Any, weight: Tensor) -> nn.Module:
    """Return a plain layer with this weight, of the class that the packed one replaced."""
    from transformers.pytorch_utils import Conv1D

    bias = packed.bias
    if issubclass(getattr(packed, "source_cls", nn.Linear), Conv1D):
        conv: nn.Module = Conv1D(packed.out_features, packed.in_features)
        conv.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        return conv
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return linear


def _unmarked(model: Any) -> Any:
    """Return a model without the marks of packed weights."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, mark):
            setattr(model, mark, False)
    return model


def _deviation(difference: Tensor) -> Deviation:
    return Deviation(float(difference.max()), float(difference.mean()))
