"""A saved adapter becomes one of stock PEFT: LoRA or SHiRA, loaded over its base and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft.export.loaded import (
    cast_of,
    check_request,
    load_processor,
    load_trained,
    shapes_of,
    spec_of,
)
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
    cast = cast_of(dtype)
    check_request(adapter, base, to, overwrite)
    shapes = shapes_of(adapter, base).model
    proof = _Proof(adapter, base, cast, shapes, verify)
    written = export_lora(
        shapes, to, uniform_rank=uniform_rank, dtype=cast, approximation=approximation,
        check=proof,
    )  # fmt: skip
    return written, proof.difference


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
    cast = cast_of(dtype)
    check_request(adapter, base, to, overwrite)
    shapes = shapes_of(adapter, base).model
    proof = _Proof(adapter, base, cast, shapes, verify)
    counts = export_shira(shapes, to, dtype=cast, check=proof)
    return counts, proof.difference


@dataclass
class _Proof:
    """Puts the processor beside a stock adapter and compares that, before it takes its name.

    Args:
        adapter: what was trained.
        base: another name of its base.
        dtype: of the stock adapter's tensors; None is float32.
        shapes: model with the adapter, without weights.
        verify: compare.
        difference: the largest of the logits, once they are compared.
    """

    adapter: Path
    base: str | None
    dtype: torch.dtype | None
    shapes: Any
    verify: bool
    difference: float | None = None

    def __call__(self, folder: Path) -> None:
        processor = load_processor(self.adapter, spec_of(self.adapter, self.base))
        if processor is not None:
            processor.save_pretrained(folder)
        if self.verify:
            self.difference = self._compared(folder, processor)

    def _compared(self, folder: Path, processor: Any) -> float:
        from peft import PeftModel

        errors = read_errors(folder)
        model = load_trained(self.adapter, self.base)
        batches = [probe_for(model, processor)]
        expected = trained_logits(model, batches)
        bound = math.inf if errors else lora_bound(model, expected, self.dtype)
        loaded = PeftModel.from_pretrained(model.unload(), str(folder))
        if errors:
            eps = torch.finfo(self.dtype or torch.float32).eps
            check_errors(self.shapes, loaded, errors, eps)
        kind = loaded.peft_config["default"].peft_type.value
        what = f"the {kind}, loaded by stock PEFT,"
        return check_equal(logits_of(loaded, batches), expected, bound=bound, what=what)
