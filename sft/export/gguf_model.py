"""Export a trained model as GGUF, read it back with transformers and compare logits."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sft.errors import UserError, one_line
from sft.export.adapter import Say
from sft.export.gguf_file import FILE, rounded, write_gguf
from sft.export.merged import check_equal, logits_of
from sft.export.reloaded import SENTENCE, probe_for
from sft.export.source import Source
from sft.whole import refuse_target, written_whole


class GgufExport(NamedTuple):
    """What was written.

    Args:
        bytes: of the file.
        difference: largest |logit difference| between the file, read by transformers, and the
            model with its weights rounded as in the file; None where it was not compared.
        rounding: largest |logit difference| that this rounding makes.
    """

    bytes: int
    difference: float | None
    rounding: float | None


def export_gguf(
    source: Source,
    to: Path,
    *,
    kind: str = "q8_0",
    quantized: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    say: Say = print,
) -> GgufExport:
    """Write a GGUF file of the merged model.

    Args:
        source: what was trained.
        to: folder to write, with one file in it.
        kind: of the matrices: "f32", "f16", "bf16" or "q8_0".
        quantized: over a packed base, what to merge into.
        overwrite: replace `to` when it is filled.
        verify: read it back and compare.
        say: takes what happens on the way.

    Raises:
        UserError: model or tokenizer has no GGUF form, `to` may not be written, or the file is not
            the trained model.
    """
    refuse_target(to, overwrite=overwrite, sources=[source.folder], option="--out")
    processor = source.processor()
    if processor is None:
        raise UserError(f"--to gguf: neither {source.folder} nor its base has a tokenizer")
    found: tuple[float, float] | None = None
    opened = source.opened(quantized=quantized, say=say)
    with opened as (weights, load), written_whole(to) as temporary:
        path = write_gguf(weights, processor, temporary, kind=kind, name=_name(source))
        size = path.stat().st_size
        if verify:
            found = _compared(temporary, load(), processor, kind)
    return GgufExport(size, *(found or (None, None)))


def _name(source: Source) -> str:
    return source.folder.name if source.run is None else source.run.name


def _compared(folder: Path, model: Any, tokenizer: Any, kind: str) -> tuple[float, float]:
    """Compare with the model whose weights are rounded as they were written."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    batches = [probe_for(model, tokenizer)]
    plain = logits_of(model, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = rounded(parameter, kind)
    expected = logits_of(model, batches)
    del model
    how = {"gguf_file": FILE, "quantization_config": GgufConfig(gguf_file=FILE, dequantize=True)}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting turns off
            reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
            ids = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)(SENTENCE)["input_ids"]
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"export: transformers does not read the GGUF file back ({one_line(error)[:200]}); "
            "pass --no-verify to keep it all the same"
        ) from error
    if ids != tokenizer(SENTENCE)["input_ids"]:
        raise UserError("export: the tokenizer of the GGUF file cuts text otherwise; report this")
    # the file rounds two settings to float32: eps of the norms, base of the rotation
    bound = 1e-4 * max(float(batch.abs().max()) for batch in expected)
    difference = check_equal(
        logits_of(reloaded, batches), expected, bound=bound, what="the GGUF file, read back,"
    )
    rounding = max(float((a - b).abs().max()) for a, b in zip(plain, expected, strict=True))
    return difference, rounding
