"""`sft export`: a saved adapter becomes a stock model with its base, or a stock LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sft.errors import UserError, one_line
from sft.export.lora import export_lora, lora_bound, verify_lora
from sft.export.merged import export_checked, probe, trained_logits
from sft.export.quantized import export_quantized
from sft.models import load_model, load_tokenizer
from sft.quantization import as_trained, is_quantized
from sft.recipe.schema import ModelSpec
from sft.whole import refuse_target

DTYPES = ("auto", "float32", "bfloat16", "float16")


def export_adapter(
    adapter: Path,
    *,
    base: str | None,
    to: Path,
    dtype: str = "auto",
    overwrite: bool = False,
    quantized: str | None = None,
    say: Callable[[str], object] = print,
) -> float:
    """Merge a saved adapter into its base, write the result, reload it and compare logits.

    Args:
        adapter: Folder with adapter_config.json.
        base: Hub id, folder or embedded name; default: what the adapter was trained on.
        to: Folder to write.
        dtype: Cast of the merged weights; "auto" keeps the base's.
        overwrite: Replace `to` when it is filled.
        quantized: Over a packed base, what to merge into; default: the dequantised base. See
            `sft.export.quantized`.
        say: Takes what merging over a packed base changed, line by line.

    Returns:
        The largest |logit difference| between the reloaded model and the one in memory.
    """
    tokenizer, model, cast = _opened(adapter, base, to, dtype, overwrite)
    if not is_quantized(model):
        if quantized is not None:
            raise UserError(
                f"--quantized: got {quantized}, but the base is not packed; leave it out"
            )
        return export_checked(model, tokenizer, to, cast)
    plain = ModelSpec(name=base or _trained_on(adapter))
    difference, error = export_quantized(
        model, tokenizer, to, quantized or "dequantize", [probe(tokenizer)], dtype=cast,
        reference=lambda: load_model(plain, "--base"),
    )  # fmt: skip
    for line in error.lines():
        say(line)
    assert difference is not None
    return difference


def export_adapter_as_lora(
    adapter: Path,
    *,
    base: str | None,
    to: Path,
    dtype: str = "auto",
    uniform_rank: bool = False,
    overwrite: bool = False,
) -> tuple[dict[str, int], float]:
    """Write a saved adapter as a stock PEFT LoRA, load that over its base and compare logits.

    Args:
        adapter: As for `export_adapter`.
        base: As for `export_adapter`.
        to: Folder to write.
        dtype: Of the factors; "auto" is float32.
        uniform_rank: Give all modules the largest rank, padded with zeros.
        overwrite: Replace `to` when it is filled.

    Returns:
        The rank of each module, and the largest |logit difference|.
    """
    tokenizer, model, cast = _opened(adapter, base, to, dtype, overwrite)
    batches = [probe(tokenizer)]
    expected = trained_logits(model, batches)
    bound = lora_bound(model, expected, cast)
    found: list[float] = []

    def check(path: Path) -> None:
        tokenizer.save_pretrained(path)
        found.append(verify_lora(path, model.unload(), batches, expected, bound=bound))

    ranks = export_lora(model, to, uniform_rank=uniform_rank, dtype=cast, check=check)
    return ranks, found[0]


def _opened(
    adapter: Path, base: str | None, to: Path, dtype: str, overwrite: bool
) -> tuple[Any, Any, torch.dtype | None]:
    """Check the request; return the tokenizer, base and adapter, and the type asked for, if any."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype: got {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter}: no adapter_config.json in it; give the folder of an adapter")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter}: no adapter_model.safetensors in it; it was not saved whole")
    spec = as_trained(adapter, ModelSpec(name=base or _trained_on(adapter)))
    refuse_target(to, overwrite=overwrite, sources=[adapter, spec.name])
    cast = None if dtype == "auto" else getattr(torch, dtype)
    return _tokenizer(adapter, spec), _adapted(adapter, spec), cast


def _trained_on(adapter: Path) -> str:
    """Return the base named in the adapter's config."""
    import json

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: does not name its base model; pass --base")
    return str(name)


def _tokenizer(adapter: Path, spec: ModelSpec) -> Any:
    """Prefer the tokenizer saved beside the adapter: it is the one of the training."""
    saved = (adapter / "tokenizer_config.json").is_file()
    return load_tokenizer(ModelSpec(name=str(adapter.absolute())) if saved else spec, "--base")


def _adapted(adapter: Path, spec: ModelSpec) -> Any:
    """Load base and adapter; a pair that does not fit is refused with the reason."""
    from peft import PeftModel
    from safetensors import SafetensorError

    from sft.adapters import registry

    registry.register_all()
    model = load_model(spec, "--base")
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except SafetensorError as error:
        raise UserError(f"{adapter}/adapter_model.safetensors: damaged ({error})") from error
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{adapter}: does not fit the base {spec.name}: {one_line(error)[:300]}"
        ) from error
