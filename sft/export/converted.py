"""Copy an adapter into today's layout: positions packed, values in another type when asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from sft.export.loaded import (
    TENSORS,
    cast_of,
    check_request,
    load_processor,
    load_trained,
    shapes_of,
    spec_of,
)
from sft.export.lora import lora_bound
from sft.export.merged import check_equal, trained_logits
from sft.export.reloaded import probe_for
from sft.whole import written_whole


def export_copy(
    adapter: Path,
    *,
    base: str | None,
    to: Path,
    dtype: str = "auto",
    overwrite: bool = False,
    verify: bool = True,
) -> tuple[int, int, float | None]:
    """Write an adapter again, load it over its base and compare logits.

    Args:
        adapter: folder with adapter_config.json.
        base: hub id, folder or embedded name; default: what the adapter was trained on.
        to: folder to write.
        dtype: of the trained values; "auto" keeps theirs. Gates and scales keep float32.
        overwrite: replace `to` when it is filled.
        verify: load and compare.

    Returns:
        Bytes of the tensors before and after, and the largest |logit difference|, if compared.
    """
    cast = cast_of(dtype)
    check_request(adapter, base, to, overwrite)
    tensors = repacked(adapter, base, cast)
    difference = None
    with written_whole(to) as temporary:
        shutil.copytree(adapter, temporary, dirs_exist_ok=True)
        _save(tensors, temporary / TENSORS)
        if verify:
            difference = _compared(temporary, adapter, base, cast)
    sizes = ((folder / TENSORS).stat().st_size for folder in (adapter, to))
    before, after = sizes
    return before, after, difference


def repacked(adapter: Path, base: str | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, as they are saved today."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from sft.adapters.layer import sparse_layers

    model = shapes_of(adapter, base).model
    kept = tuple(f".{part}" for x in sparse_layers(model).values() for part in x.keep_dtype)
    found = load_file(adapter / TENSORS)
    for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if name in found and tensor.dtype == torch.uint8:
            found[name] = tensor
    if dtype is None:
        return found
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and not name.endswith(kept) else tensor
        for name, tensor in found.items()
    }


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def _compared(folder: Path, adapter: Path, base: str | None, dtype: torch.dtype | None) -> float:
    model = load_trained(adapter, base)
    batches = [probe_for(model, load_processor(adapter, spec_of(adapter, base)))]
    expected = trained_logits(model, batches)
    bound = 0.0 if dtype is None else lora_bound(model, expected, dtype)
    del model
    found = trained_logits(load_trained(folder, base), batches)
    return check_equal(found, expected, bound=bound, what="the adapter, loaded again,")
