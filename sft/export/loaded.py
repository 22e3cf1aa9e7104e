"""Load what is exported: base and adapter as they were trained, and the processor beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sft.errors import UserError, one_line
from sft.models import load_model, load_tokenizer, locate
from sft.quantization import as_trained
from sft.recipe.schema import ModelSpec
from sft.whole import refuse_target

DTYPES = ("auto", "float32", "bfloat16", "float16")
SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def cast_of(dtype: str) -> torch.dtype | None:
    """Return the type that weights are written in; None, of "auto", keeps theirs.

    Raises:
        UserError: it is none of DTYPES.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype: got {dtype!r}; expected one of {', '.join(DTYPES)}")
    return None if dtype == "auto" else getattr(torch, dtype)


def check_request(adapter: Path, base: str | None, to: Path, overwrite: bool) -> None:
    """Raise UserError unless an adapter is there, and the folder may be written."""
    if not (adapter / SETTINGS).is_file():
        raise UserError(f"{adapter}: no {SETTINGS} in it; give the folder of an adapter")
    if not (adapter / TENSORS).is_file():
        raise UserError(f"{adapter}: no {TENSORS} in it; it was not saved whole")
    refuse_target(
        to, overwrite=overwrite, sources=[adapter, spec_of(adapter, base).name], option="--out"
    )


def spec_of(adapter: Path, base: str | None) -> ModelSpec:
    """Return the base of an adapter, packed as it was in training."""
    return as_trained(adapter, ModelSpec(name=base or trained_on(adapter)))


def trained_on(adapter: Path) -> str:
    """Return the base named in the adapter's config.

    Raises:
        UserError: none is named.
    """
    from sft.tools.opened import read_settings

    name = read_settings(adapter).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: does not name its base model; pass --base")
    return str(name)


def load_base(adapter: Path, base: str | None, *, packed: bool = True) -> Any:
    """Load the base of an adapter, with the head that the adapter was trained with.

    Args:
        adapter: its folder.
        base: another name of the base.
        packed: as in training; or as it was before.
    """
    spec = spec_of(adapter, base)
    if not packed:
        spec = ModelSpec(name=spec.name)
    shapes = shapes_of(adapter, spec.name).model.get_base_model()
    return load_model(spec, "--base", kind=type(shapes), config=shapes.config)


def load_trained(adapter: Path, base: str | None, *, packed: bool = True) -> Any:
    """Load base and adapter.

    Raises:
        UserError: they do not fit together.
    """
    from peft import PeftModel

    model = load_base(adapter, base, packed=packed)
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{adapter}: does not fit the base {base or trained_on(adapter)}: "
            f"{one_line(error)[:300]}"
        ) from error


def shapes_of(adapter: Path, base: str | None) -> Any:
    """Open an adapter over the shapes of its base.

    Raises:
        UserError: the file is damaged, or does not fit.
    """
    from sft.tools.opened import open_adapter

    return open_adapter(adapter, base)


def load_processor(folder: Path, spec: ModelSpec) -> Any:
    """Load tokenizer or image processor: the one beside the weights, which was trained with.

    Args:
        folder: of an adapter or a model.
        spec: of the base, where the folder has none.

    Returns:
        It, or None: neither folder nor base has any.
    """
    from transformers import AutoImageProcessor

    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(ModelSpec(name=str(folder.absolute())), "--base")
    if (folder / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(folder)
    place = locate(spec, "--base")
    try:
        return load_tokenizer(spec, "--base")
    except UserError:
        try:
            return AutoImageProcessor.from_pretrained(place, revision=spec.revision)
        except (OSError, ValueError):
            return None


def save_beside(folder: Path, processor: Any, base: str | None, revision: str | None) -> None:
    """Write what a model is used with: processor, chat template, how it generates."""
    from transformers import GenerationConfig

    if processor is not None:
        processor.save_pretrained(folder)
    if base is None:
        return
    try:
        place = locate(ModelSpec(name=base, revision=revision), "--base")
        GenerationConfig.from_pretrained(place, revision=revision).save_pretrained(folder)
    except (OSError, ValueError):
        return  # the base has none
