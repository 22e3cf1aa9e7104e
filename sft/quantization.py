"""Load a base whose linear layers bitsandbytes packs in 4 or 8 bits."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch

from sft.errors import UserError, one_line
from sft.recipe.schema import ModelSpec, QuantizationSpec

RECORD = "base_quantization.json"  # beside an adapter: how the base under it was packed
RECIPE = "recipe.yaml"  # of a run, which says it for what lies in these folders of it
INSIDE = ("checkpoint-", "zeroth_order")


def loading_arguments(spec: ModelSpec, config: Any, device: str | None = None) -> dict[str, Any]:
    """Return what `from_pretrained` takes to pack a model while it loads.

    Args:
        spec: with a `quantization:` section.
        config: of the model.
        device: where the weights go, default: where training would put them.

    Raises:
        UserError: bitsandbytes is missing, or the model is packed on disk already.
    """
    assert spec.quantization is not None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization: {spec.quantization.bits} needs the package bitsandbytes: "
            'pip install "sparse-sft[quant]"'
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model.quantization: got {spec.quantization.bits}, but {spec.name} is stored quantised"
            " and loads as it is; leave the section out"
        )
    dtype = _dtype_of(spec, config)
    return {
        "quantization_config": bitsandbytes_config(spec.quantization, dtype, config),
        "dtype": dtype,
        "device_map": {"": device or own_device()},
    }


def bitsandbytes_config(spec: QuantizationSpec, dtype: torch.dtype, config: Any) -> Any:
    """Return transformers' configuration of a section.

    Args:
        spec: the section.
        dtype: of the model's other weights.
        config: of the model; names its output head, which is never packed.
    """
    from transformers import BitsAndBytesConfig

    # transformers leaves the head out only where nobody names modules to leave out
    skipped = [*spec.skip_modules, *_heads(config)] if spec.skip_modules else None
    if spec.bits == "int8":
        threshold = 6.0 if spec.outlier_threshold is None else spec.outlier_threshold
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=skipped
        )
    computed = dtype if spec.compute_dtype == "auto" else getattr(torch, spec.compute_dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.bits,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=computed,
        bnb_4bit_quant_storage=getattr(torch, spec.storage_dtype),
        llm_int8_skip_modules=skipped,
    )


def own_device() -> str:
    """Return the device on which this process trains: packed weights do not move there later."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def is_quantized(model: Any) -> bool:
    """Tell whether a model, adapted or not, has packed weights."""
    from sft.adapters.quantized import packed_modules

    return any(True for _ in packed_modules(model))


def write_record(folder: Path, spec: ModelSpec) -> None:
    """Note beside an adapter how the base under it was packed, for `sft export`."""
    if spec.quantization is not None:
        content = {"dtype": spec.dtype, "quantization": spec.quantization.model_dump()}
        (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def as_trained(folder: Path, spec: ModelSpec) -> ModelSpec:
    """Return the base of an adapter with the packing it was trained under, if any was noted.

    Args:
        folder: of an adapter, of a checkpoint, or of the log of a zeroth-order run.
        spec: the base, unpacked.

    Raises:
        UserError: the note is damaged.
    """
    record = folder / RECORD
    if not record.is_file() and folder.absolute().name.startswith(INSIDE):
        record = folder.absolute().parent / RECIPE
    if not record.is_file():
        return spec
    try:
        read = _packing_of if record.name == RECIPE else _noted
        content = read(record)
        return ModelSpec.model_validate(spec.model_dump() | content)
    except (ValueError, TypeError) as error:
        raise UserError(f"{record}: is damaged ({error}); write it again") from error


def _noted(record: Path) -> dict[str, Any]:
    return dict(json.loads(record.read_text(encoding="utf-8")))


def _packing_of(recipe: Path) -> dict[str, Any]:
    """Return what a recipe says of packing, as a record has it; nothing where it does not pack."""
    import yaml

    try:
        model = dict(yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"])
    except (yaml.YAMLError, KeyError) as error:
        raise ValueError(one_line(error)) from error
    return {key: model[key] for key in ("dtype", "quantization") if model.get("quantization")}


def _dtype_of(spec: ModelSpec, config: Any) -> torch.dtype:
    found = config.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return found or torch.float32


def _heads(config: Any) -> list[str]:
    """Return the names of a model's output heads."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]
