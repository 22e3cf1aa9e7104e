"""A saved adapter becomes a stock model: shard by shard where its files allow it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sft.errors import UserError
from sft.export.adapter_weights import AdapterWeights, WholeModelNeededError
from sft.export.loaded import (
    cast_of,
    check_request,
    load_processor,
    load_trained,
    save_beside,
    spec_of,
)
from sft.export.merged import (
    export_checked,
    logits_of,
    merge,
    merging_bound,
    trained_logits,
    verify_merged,
)
from sft.export.quantized import export_quantized
from sft.export.reloaded import probe_for
from sft.export.shards import SHARD, write_shards
from sft.models import load_model
from sft.quantization import is_quantized
from sft.recipe.schema import ModelSpec
from sft.whole import written_whole

Say = Callable[[str], object]


def export_adapter(
    adapter: Path,
    *,
    base: str | None,
    to: Path,
    dtype: str = "auto",
    overwrite: bool = False,
    quantized: str | None = None,
    verify: bool = True,
    max_shard_size: str = SHARD,
    say: Say = print,
) -> float | None:
    """Merge a saved adapter into its base, write the result, reload it and compare logits.

    Writing takes the memory of one shard. Comparing takes that of the model.

    Args:
        adapter: Folder with adapter_config.json.
        base: Hub id, folder or embedded name; default: what the adapter was trained on.
        to: Folder to write.
        dtype: Cast of the merged weights; "auto" keeps the base's.
        overwrite: Replace `to` when it is filled.
        quantized: Over a packed base, what to merge into; default: the dequantised base. See
            `sft.export.quantized`.
        verify: Reload and compare.
        max_shard_size: Of a file of weights.
        say: Takes what happens on the way, line by line.

    Returns:
        The largest |logit difference| between the reloaded model and the trained one, if compared.

    Raises:
        UserError: base and adapter do not fit together, `to` may not be written, or what was
            written is not the trained model.
    """
    cast = cast_of(dtype)
    check_request(adapter, base, to, overwrite)
    spec = spec_of(adapter, base)
    processor = load_processor(adapter, spec)
    if spec.quantization is None:
        if quantized is not None:
            raise UserError(
                f"--quantized: got {quantized}, but the base is not packed; leave it out"
            )
        try:
            weights = AdapterWeights(adapter, base)
        except WholeModelNeededError as reason:
            say(f"merged as a whole in memory, because {reason}")
        else:
            return _by_shards(
                weights, adapter, processor, to, base=base, dtype=cast, verify=verify,
                max_shard_size=max_shard_size, say=say,
            )  # fmt: skip
    model = load_trained(adapter, base)
    if not is_quantized(model):
        return export_checked(
            model, processor, to, cast, verify=verify, max_shard_size=max_shard_size
        )
    return _packed(
        model, processor, to, quantized or "dequantize", base=spec.name, dtype=cast,
        verify=verify, max_shard_size=max_shard_size, say=say,
    )  # fmt: skip


def _by_shards(
    weights: AdapterWeights,
    adapter: Path,
    processor: Any,
    to: Path,
    *,
    base: str | None,
    dtype: torch.dtype | None,
    verify: bool,
    max_shard_size: str,
    say: Say,
) -> float | None:
    name, revision = weights.base
    difference = None
    with written_whole(to) as temporary:
        count = write_shards(weights, temporary, dtype=dtype, max_shard_size=max_shard_size)
        save_beside(temporary, processor, name, revision)
        say(f"merged weight by weight into {count} file{'s' * (count > 1)}")
        if verify:
            difference = _verified(temporary, adapter, base, processor, dtype)
    return difference


def _verified(
    folder: Path, adapter: Path, base: str | None, processor: Any, dtype: torch.dtype | None
) -> float:
    """Compare a merged folder with base and adapter; one of both models is in memory at a time."""
    model = load_trained(adapter, base)
    batches = [probe_for(model, processor)]
    if dtype is None:
        expected = trained_logits(model, batches)
        bound = merging_bound(model, expected)
    else:  # rounding the weights is what was asked for: compare what was rounded
        expected, bound = logits_of(merge(model, dtype), batches), 0.0
    del model
    return verify_merged(folder, batches, expected, bound=bound)


def _packed(
    model: Any,
    processor: Any,
    to: Path,
    mode: str,
    *,
    base: str,
    dtype: torch.dtype | None,
    verify: bool,
    max_shard_size: str,
    say: Say,
) -> float | None:
    """Merge over a packed base in the way asked for, and say what that changed."""
    kind = type(model.get_base_model())
    difference, error = export_quantized(
        model, processor, to, mode, [probe_for(model, processor)], verify=verify, dtype=dtype,
        max_shard_size=max_shard_size,
        reference=lambda: load_model(ModelSpec(name=base), "--base", kind=kind),
    )  # fmt: skip
    for line in error.lines():
        say(line)
    return difference
