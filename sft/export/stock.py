"""A saved adapter becomes one of stock PEFT: LoRA or SHiRA, loaded over its base and compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from sft.export.loaded import check_request, load_processor, load_trained, shapes_of, spec_of
from sft.export.lora import (
    LoraExport,
    check_errors,
    export_lora,
    lora_bound,
    read_errors,
)
from sft.export.low_rank import Approximation
from sft.export.merged import check_equal, logits_of, trained_logits
from sft.export.reloaded import probe_for
from sft.export.shira import export_shira


def export_adapter_as_lora(
    adapter: Path,
    *,
    base: str | None,
    to: Path,
    dtype: str = "auto",
    uniform_rank: bool = False,
    overwrite: bool = False,
    approximation: Approximation | None = None,
    verify: bool = True,
) -> tuple[LoraExport, float | None]:
    """Write a saved adapter as a stock PEFT LoRA, load that over its base and compare logits.

    Args:
        adapter: folder with adapter_config.json.
        base: hub id, folder or embedded name; default: what the adapter was trained on.
        to: folder to write.
        dtype: of the factors; "auto" is float32.
        uniform_rank: give all modules the largest rank, padded with zeros.
        overwrite: replace `to` when it is filled.
        approximation: how near a delta without a low rank has to be.
        verify: load and compare.

    Returns:
        What was written, and the largest |logit difference| from the trained model, if compared.
    """
    check_request(adapter, base, to, dtype, overwrite)
    cast = None if dtype == "auto" else getattr(torch, dtype)
    shapes = shapes_of(adapter, base).model
    found: list[float] = []

    def check(path: Path) -> None:
        _save_processor(path, adapter, base)
        if verify:
            found.append(_compared(path, adapter, base, cast, shapes))

    written = export_lora(
        shapes, to, uniform_rank=uniform_rank, dtype=cast, approximation=approximation,
        check=check,
    )  # fmt: skip
    return written, found[0] if found else None


def export_adapter_as_shira(
    adapter: Path,
    *,
    base: str | None,
    to: Path,
    dtype: str = "auto",
    overwrite: bool = False,
    verify: bool = True,
) -> tuple[dict[str, int], float | None]:
    """Write a saved sparse delta as a stock PEFT SHiRA, load it over its base and compare logits.

    Args:
        adapter: as for `export_adapter_as_lora`.
        base: as for `export_adapter_as_lora`.
        to: folder to write.
        dtype: of the values; "auto" is float32.
        overwrite: replace `to` when it is filled.
        verify: load and compare.

    Returns:
        The number of weights by module, and the largest |logit difference|, if compared.
    """
    check_request(adapter, base, to, dtype, overwrite)
    cast = None if dtype == "auto" else getattr(torch, dtype)
    found: list[float] = []

    def check(path: Path) -> None:
        _save_processor(path, adapter, base)
        if verify:
            found.append(_compared(path, adapter, base, cast))

    counts = export_shira(shapes_of(adapter, base).model, to, dtype=cast, check=check)
    return counts, found[0] if found else None


def _compared(
    folder: Path,
    adapter: Path,
    base: str | None,
    dtype: torch.dtype | None,
    shapes: Any = None,
) -> float:
    """Load a stock adapter over the base, and compare it with ours."""
    from peft import PeftModel

    errors = read_errors(folder)

    model = load_trained(adapter, base)
    batches = [probe_for(model, load_processor(adapter, spec_of(adapter, base)))]
    expected = trained_logits(model, batches)
    bound = math.inf if errors else lora_bound(model, expected, dtype)
    loaded = PeftModel.from_pretrained(model.unload(), str(folder))
    if errors:
        eps = torch.finfo(dtype or torch.float32).eps
        check_errors(shapes, loaded, errors, eps)
    kind = loaded.peft_config["default"].peft_type.value
    what = f"the {kind}, loaded by stock PEFT,"
    return check_equal(logits_of(loaded, batches), expected, bound=bound, what=what)


def _save_processor(folder: Path, adapter: Path, base: str | None) -> None:
    processor = load_processor(adapter, spec_of(adapter, base))
    if processor is not None:
        processor.save_pretrained(folder)
