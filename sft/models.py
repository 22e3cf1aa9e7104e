"""Load a causal language model and its tokenizer: hub id, local folder, or embedded name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sft import embedded
from sft.data.chat_template import read_template
from sft.errors import UserError, one_line, unknown_name
from sft.quantization import loading_arguments
from sft.recipe.schema import ModelSpec


def load_model(
    spec: ModelSpec,
    key: str = "model.name",
    device: str | None = None,
    *,
    kind: Any = None,
    config: Any = None,
    missing: list[str] | None = None,
) -> Any:
    """Load the model named by a recipe, in eval mode, on the CPU.

    Args:
        spec: The `model:` section. Code shipped with a model runs only with `trust_remote_code`.
        key: What an error calls the name: where the user gave it.
        device: Where a quantised model goes, which stays there; default: this process's GPU.
        kind: Class to load; default: a causal language model of the right architecture.
        config: In place of the saved one: with other labels, for example.
        missing: Takes the names of the parameters that are not in the files: they are random.

    Raises:
        UserError: When the model cannot be found, does not load, or cannot be packed.
    """
    from transformers import AutoModelForCausalLM

    from sft.adapters.quantized import check_unpacks, keep_packed

    extra = {"attn_implementation": spec.attn_implementation} if spec.attn_implementation else {}
    dtype = spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
    how = {"dtype": dtype, **extra}
    if config is not None:  # a head for other labels starts anew
        how |= {"config": config, "ignore_mismatched_sizes": True}
    if spec.quantization is not None:
        how |= loading_arguments(spec, load_config(spec, key), device)
    found = _load(kind or AutoModelForCausalLM, spec, key, output_loading_info=True, **how)
    model = found[0]
    if missing is not None:
        missing[:] = _random(model, found[1])
    try:
        check_unpacks(model)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    keep_packed(model)
    return model


def load_config(spec: ModelSpec, key: str = "model.name") -> Any:
    """Load the configuration of the named model, with the fields of `model.config` in place.

    Raises:
        UserError: When it does not load, or has no such field.
    """
    from transformers import AutoConfig

    extra = {"attn_implementation": spec.attn_implementation} if spec.attn_implementation else {}
    config, unknown = _load(
        AutoConfig, spec, key, return_unused_kwargs=True, **extra, **(spec.config or {})
    )
    if unknown:
        text = unknown_name(next(iter(unknown)), config.to_dict())
        raise UserError(f"model.config: {text}")
    return config


def load_tokenizer(spec: ModelSpec, key: str = "model.name") -> Any:
    """Load the model's tokenizer, with the recipe's chat template where it gives one.

    A missing padding token becomes the end-of-text token.
    """
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, spec, key)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if spec.chat_template is not None:
        tokenizer.chat_template = read_template(spec.chat_template)
    return tokenizer


def load_image_processor(spec: ModelSpec, key: str = "model.name") -> Any:
    """Load the model's image processor."""
    from transformers import AutoImageProcessor

    return _load(AutoImageProcessor, spec, key)


def locate(spec: ModelSpec, key: str = "model.name") -> str:
    """Return the folder or hub id behind a name; an embedded model is converted on first use.

    Raises:
        UserError: it is a path, and no folder is there.
    """
    if spec.name in embedded.MODELS:
        return str(embedded.folder_of(spec.name))
    path = Path(spec.name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or spec.name.startswith((".", "~")):
        raise UserError(f"{key}: {spec.name}: no such folder")
    return spec.name


def _random(model: Any, info: dict[str, Any]) -> list[str]:
    """Return the parameters that loading left as they were initialised."""
    other_size = [
        entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]
    ]
    names = {name for name, _ in model.named_parameters()}
    return sorted(names & {*info["missing_keys"], *other_size})


def _load(auto: Any, spec: ModelSpec, key: str = "model.name", **extra: Any) -> Any:
    """Call `from_pretrained`, and say in one line why it failed."""
    name = locate(spec, key)
    try:
        return auto.from_pretrained(
            name, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **extra
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {spec.name}: does not load ({one_line(error)[:300]}); "
            f"expected a local folder, a hub id, or one of: {', '.join(embedded.MODELS)}"
        ) from error
    except (ImportError, RuntimeError, NotImplementedError) as error:
        if spec.quantization is None:
            raise
        raise UserError(
            f"model.quantization: {spec.quantization.bits} does not load here "
            f"({one_line(error)[:300]}); update bitsandbytes, or leave the section out"
        ) from error
