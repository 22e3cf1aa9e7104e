"""Write a trained model as an ordinary checkpoint, and prove that it is the trained model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sft.errors import UserError
from sft.export.reloaded import first_output, probe_for, reload
from sft.export.shards import SHARD
from sft.quantization import is_quantized
from sft.whole import written_whole

Batches = Sequence[dict[str, torch.Tensor]]


def export_merged(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    check: Callable[[Path], None] | None = None,
    max_shard_size: str = SHARD,
) -> Any:
    """Merge an adapter into its base and save both as one stock model.

    The weights are merged in place, never copied: `model` is spent, use what is returned. The
    folder appears whole or not at all.

    Args:
        model: A PeftModel, or a plain model (saved as it is).
        tokenizer: Saved beside the weights; an image processor will do, or None.
        folder: Where to write; replaced when it exists.
        dtype: Cast the merged weights, default: as they are.
        check: Called with the finished folder before it takes its name; may raise.
        max_shard_size: Of a file of weights.

    Returns:
        The merged model, of the base's own class.
    """
    merged = merge(model, dtype)
    with written_whole(folder) as temporary:
        merged.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if check is not None:
            check(temporary)
    return merged


def export_checked(
    model: Any,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    verify: bool = True,
    max_shard_size: str = SHARD,
) -> float | None:
    """Merge, write, reload with stock transformers, and compare logits on a sentence.

    Args:
        model: As for `export_merged`.
        tokenizer: As for `export_merged`.
        folder: As for `export_merged`.
        dtype: Cast the merged weights, default: as they are.
        verify: Reload and compare.
        max_shard_size: Of a file of weights.

    Returns:
        The largest |logit difference| between the reloaded model and the one in memory, if
        compared.

    Raises:
        UserError: It is larger than merging explains.
    """
    if not verify:
        export_merged(model, tokenizer, folder, dtype=dtype, max_shard_size=max_shard_size)
        return None
    batches = [probe_for(model, tokenizer)]
    expected = trained_logits(model, batches)
    bound = merging_bound(model, expected)
    merged = merge(model, dtype)
    if dtype is not None:  # rounding the weights is what was asked for: compare what was rounded
        expected, bound = logits_of(merged, batches), 0.0
    found: list[float] = []

    def check(path: Path) -> None:
        found.append(verify_merged(path, batches, expected, bound=bound))

    export_merged(merged, tokenizer, folder, check=check, max_shard_size=max_shard_size)
    return found[0]


def merge(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Merge an adapter into its base, in place, and cast the result when asked.

    Raises:
        UserError: The adapter has no merged form.
    """
    if hasattr(model, "peft_config") and not hasattr(model, "merge_and_unload"):
        kind = model.active_peft_config.peft_type.value.lower()
        raise UserError(
            f"merged: {kind} cannot be merged into the weights of a model; use the adapter itself"
        )
    if hasattr(model, "peft_config") and is_quantized(model):
        raise UserError(
            "merged: the base is packed in 4 or 8 bits, and packing the sum anew would round "
            "deltas away; use sft.export.quantized.export_quantized, which says what it costs"
        )
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return merged if dtype is None else in_dtype(merged, dtype)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Return a model whose stored weights are of a dtype, as loading it in that dtype gives.

    `Module.to` would cast what is computed at loading as well: in 16 bits the frequencies of rotary
    embeddings are others.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


@torch.no_grad()
def logits_of(model: Any, batches: Batches) -> list[torch.Tensor]:
    """Return a model's logits on a few batches, in eval mode."""
    training = model.training
    model.eval()
    try:
        return [first_output(model(**batch)).float().cpu() for batch in batches]
    finally:
        model.train(training)


def trained_logits(model: Any, batches: Batches) -> list[torch.Tensor]:
    """Return the logits of an adapted model, computed with the weights it was trained with."""
    from sft import resident

    with resident(model) if hasattr(model, "peft_config") else contextlib.nullcontext():
        return logits_of(model, batches)


def merging_bound(model: Any, logits: Sequence[torch.Tensor]) -> float:
    """Return how far merging may move the logits of a trained model.

    Nothing, for a plain model and a method that trains with the very weights it merges. One that
    trains beside W rounds its delta into W once: half the digits of the weights' type are allowed
    to differ. A head of a single output is a scalar product, which is summed up in an order that
    depends on where its tensors lie in memory: a few units of the last digit.

    Args:
        model: As it was trained, before merging.
        logits: Of the trained model.
    """
    from sft.adapters.layer import sparse_layers

    layers = sparse_layers(model).values()
    stock = hasattr(model, "peft_config") and not layers
    if not stock and all(layer.merges_exactly(n) for layer in layers for n in layer.trained_values):
        scalar = logits[0].shape[-1] == 1
        return float(8 * torch.finfo(model.dtype).eps * _largest(logits)) if scalar else 0.0
    return half_the_digits(model.dtype, logits)


def half_the_digits(dtype: torch.dtype, logits: Sequence[torch.Tensor]) -> float:
    """Return what half the digits of a type are worth, at the largest of some logits."""
    return float(torch.finfo(dtype).eps ** 0.5 * _largest(logits))


def _largest(logits: Sequence[torch.Tensor]) -> float:
    return max(float(batch.abs().max()) for batch in logits)


def verify_merged(
    folder: Path, batches: Batches, expected: Sequence[torch.Tensor], *, bound: float = 0.0
) -> float:
    """Reload a merged folder with stock transformers and compare its logits.

    Args:
        folder: What `export_merged` wrote.
        batches: Inputs of the comparison.
        expected: Logits of the trained model on them.
        bound: Largest difference allowed; 0 asks for equal bits.

    Returns:
        The largest absolute difference found.

    Raises:
        UserError: When the difference exceeds the bound.
    """
    from sft.adapters.quantized import keep_packed

    reloaded = reload(folder)
    keep_packed(reloaded)
    reloaded.to(next(iter(batches[0].values())).device)
    return check_equal(
        logits_of(reloaded, batches), expected, bound=bound, what="the merged folder, reloaded,"
    )


def check_equal(
    found: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    *,
    bound: float = 0.0,
    what: str,
) -> float:
    """Return the largest |difference| of logits.

    Args:
        found: of what was exported.
        expected: of the trained model.
        bound: largest difference allowed; 0 asks for equal bits.
        what: names what was exported.

    Raises:
        UserError: it exceeds the bound.
    """
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    if not worst <= bound:  # NaN fails too
        raise UserError(
            f"export: {what} is not the trained model: max |logit difference| {worst:.3g}, "
            f"allowed {bound:g}"
        )
    return worst
