"""Export a patch of a trained model, apply it to the base again and compare logits."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.export.adapter import Say
from sft.export.merged import check_equal, logits_of
from sft.export.patch import PatchCounts, apply_patches, read_patches, write_patch
from sft.export.reloaded import probe_for
from sft.export.shards import write_shards
from sft.export.source import Source
from sft.export.stored import PatchedWeights
from sft.models import load_model
from sft.recipe.schema import ModelSpec
from sft.whole import refuse_target, written_whole


def export_patch(
    source: Source,
    to: Path,
    *,
    quantized: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    say: Say = print,
) -> tuple[PatchCounts, float | None]:
    """Write the weights that changed, as a server that holds the base takes them.

    Args:
        source: what was trained.
        to: folder to write.
        quantized: over a packed base: "reference", a patch of the base as it was.
        overwrite: replace `to` when it is filled.
        verify: apply it to the base and compare.
        say: takes what happens on the way.

    Returns:
        What the patch holds, and the largest |logit difference| between base and patch and the
        merged model, if compared.

    Raises:
        UserError: the base is packed and `quantized` is not "reference", `to` may not be written,
            or base and patch are not the trained model.
    """
    spec = source.base_spec()
    refuse_target(to, overwrite=overwrite, sources=[source.folder, spec.name], option="--out")
    if spec.quantization is not None and quantized != "reference":
        raise UserError(
            f"--to patch: the base was packed in {spec.quantization.bits}, and what it was "
            "unpacked to differs everywhere; pass --quantized reference for a patch of the base "
            "as it was, or take --to merged"
        )
    difference = None
    opened = source.opened(quantized=quantized, say=say)
    with opened as (weights, load), written_whole(to) as temporary:
        counts = write_patch(weights, temporary, spec.name)
        if verify:
            difference = _compared(temporary, spec, load(), source.processor())
    return counts, difference


def _compared(folder: Path, spec: ModelSpec, model: Any, processor: Any) -> float:
    """Compare base and patch with the trained model."""
    batches = [probe_for(model, processor)]
    expected, kind, config = logits_of(model, batches), type(model), model.config
    del model
    patched = _patched(folder, ModelSpec(name=spec.name), kind, config)
    return check_equal(logits_of(patched, batches), expected, what="base and patch")


def _patched(folder: Path, spec: ModelSpec, kind: Any, config: Any) -> Any:
    """Load the base with the patch: in memory, or in files where these have names of their own."""
    model = load_model(spec, "--base", kind=kind, config=config)
    own = dict(model.named_parameters(remove_duplicate=False))
    if all(patch.name in own for patch in read_patches(folder)):
        apply_patches(own, folder)
        return model
    del model, own
    with tempfile.TemporaryDirectory() as work:
        write_shards(PatchedWeights(folder, spec.name), Path(work))
        return load_model(ModelSpec(name=work), "--base", kind=kind, config=config)
