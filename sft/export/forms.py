"""Everything that a trained model can be exported as."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.export.adapter import Say, export_adapter
from sft.export.card import Facts, read_run, write_card
from sft.export.converted import export_copy
from sft.export.delta import export_delta
from sft.export.gguf_model import export_gguf
from sft.export.loaded import SETTINGS, cast_of, save_beside
from sft.export.low_rank import ERROR, RANK, Approximation
from sft.export.merged import check_equal, logits_of, merge
from sft.export.patched import export_patch
from sft.export.reloaded import probe_for, reload
from sft.export.shards import SHARD, write_shards
from sft.export.source import Source, find_source
from sft.export.spec import is_size
from sft.export.stock import export_adapter_as_lora, export_adapter_as_shira
from sft.whole import refuse_target, written_whole


@dataclass(frozen=True)
class Request:
    """What to write, and how.

    Args:
        to: folder to write.
        base: hub id, folder or embedded name; default: what was trained.
        dtype: of the weights; "auto" keeps theirs.
        overwrite: replace `to` when it is filled.
        verify: reload what was written and compare logits.
        quantized: over a packed base, what to merge into.
        rank: of a LoRA: highest rank of a module that has no low one.
        max_error: of a LoRA: largest relative error of such a module.
        uniform_rank: of a LoRA: one rank for all modules.
        gguf_type: of the matrices of a GGUF file.
        max_shard_size: of a file of a merged model.
    """

    to: Path
    base: str | None = None
    dtype: str = "auto"
    overwrite: bool = False
    verify: bool = True
    quantized: str | None = None
    rank: int = RANK
    max_error: float = ERROR
    uniform_rank: bool = False
    gguf_type: str = "q8_0"
    max_shard_size: str = SHARD


def export(folder: Path, form: str, request: Request, say: Say = print) -> str:
    """Export what a folder holds, with a model card, and return what to say of it.

    Args:
        folder: of an adapter, a run, a delta, a patch or a model.
        form: one of FORMS.
        request: what to write.
        say: takes what happens on the way.

    Raises:
        UserError: folder, form and request do not fit together, or what was written is not the
            trained model; nothing is left then.
    """
    if form not in FORMS:
        raise UserError(f"--to: got {form!r}; expected one of {', '.join(FORMS)}")
    cast_of(request.dtype)  # refused before anything is read
    if not is_size(request.max_shard_size):
        raise UserError(
            f"--max-shard-size: got {request.max_shard_size!r}; expected one such as 5GB"
        )
    source = find_source(folder, request.base)
    read: list[Path | str] = [source.folder]
    if source.base_known:
        read.append(source.base_spec().name)
    refuse_target(request.to, overwrite=request.overwrite, sources=read, option="--out")
    told = FORMS[form](source, request, say)
    write_card(request.to, _facts(source, form, request.to))
    return f"{request.to}: {told}"


def _merged(source: Source, request: Request, say: Say) -> str:
    if source.kind == "adapter":
        difference = export_adapter(
            source.folder, base=source.base, to=request.to, dtype=request.dtype,
            overwrite=request.overwrite, quantized=request.quantized, verify=request.verify,
            max_shard_size=request.max_shard_size, say=say,
        )  # fmt: skip
    elif source.kind == "delta":
        difference = export_delta(
            source.folder, base=source.base, to=request.to, dtype=request.dtype,
            overwrite=request.overwrite, verify=request.verify,
            max_shard_size=request.max_shard_size,
        )  # fmt: skip
    else:
        difference = _rewritten(source, request, say)
    return f"a stock model{_proof('reloaded', difference)}"


def _rewritten(source: Source, request: Request, say: Say) -> float | None:
    """Write a patched or a whole model, in other files or another type."""
    dtype = cast_of(request.dtype)
    with source.opened(say=say) as (weights, load), written_whole(request.to) as temporary:
        write_shards(weights, temporary, dtype=dtype, max_shard_size=request.max_shard_size)
        processor = source.processor()
        kept = str(source.folder.absolute()) if source.kind == "model" else source.base_spec().name
        save_beside(temporary, processor, kept, None)
        if not request.verify:
            return None
        model = merge(load(), dtype)
        batches = [probe_for(model, processor)]
        expected = logits_of(model, batches)
        del model
        found = logits_of(reload(temporary), batches)
        return check_equal(found, expected, what="the merged folder, reloaded,")


def _adapter(source: Source, request: Request, say: Say) -> str:
    before, after, difference = export_copy(
        _adapter_of(source, "adapter"), base=source.base, to=request.to, dtype=request.dtype,
        overwrite=request.overwrite, verify=request.verify,
    )  # fmt: skip
    return f"an adapter of {after:,} bytes (was {before:,}){_proof('loaded again', difference)}"


def _lora(source: Source, request: Request, say: Say) -> str:
    written, difference = export_adapter_as_lora(
        _adapter_of(source, "lora"), base=source.base, to=request.to, dtype=request.dtype,
        uniform_rank=request.uniform_rank, overwrite=request.overwrite, verify=request.verify,
        approximation=Approximation(request.max_error, request.rank),
    )  # fmt: skip
    for line in written.lines():
        say(line)
    ranks = written.ranks.values()
    shown = f"a LoRA, {len(ranks)} modules of rank {min(ranks)} to {max(ranks)}"
    return shown + _proof("loaded by stock PEFT", difference)


def _shira(source: Source, request: Request, say: Say) -> str:
    counts, difference = export_adapter_as_shira(
        _adapter_of(source, "shira"), base=source.base, to=request.to, dtype=request.dtype,
        overwrite=request.overwrite, verify=request.verify,
    )  # fmt: skip
    shown = f"a SHiRA, {sum(counts.values()):,} weights in {len(counts)} modules"
    return shown + _proof("loaded by stock PEFT", difference)


def _patch(source: Source, request: Request, say: Say) -> str:
    counts, difference = export_patch(
        source, request.to, quantized=request.quantized, overwrite=request.overwrite,
        verify=request.verify, say=say,
    )  # fmt: skip
    return f"a patch of {counts.line()}{_proof('applied to the base', difference)}"


def _gguf(source: Source, request: Request, say: Say) -> str:
    done = export_gguf(
        source, request.to, kind=request.gguf_type, quantized=request.quantized,
        overwrite=request.overwrite, verify=request.verify, say=say,
    )  # fmt: skip
    shown = f"a GGUF file of {done.bytes:,} bytes{_proof('read by transformers', done.difference)}"
    if done.rounding is None:
        return shown
    return f"{shown} (rounding to {request.gguf_type} moves them by up to {done.rounding:.3g})"


FORMS: dict[str, Callable[[Source, Request, Say], str]] = {
    "merged": _merged,
    "adapter": _adapter,
    "lora": _lora,
    "shira": _shira,
    "patch": _patch,
    "gguf": _gguf,
}


def _adapter_of(source: Source, form: str) -> Path:
    if source.kind != "adapter":
        raise UserError(
            f"--to {form}: {source.folder} holds a {source.kind}, allowed is an adapter; use --to "
            "merged, or --to patch"
        )
    return source.folder


def _proof(how: str, difference: float | None) -> str:
    return "" if difference is None else f"; {how}, max |logit difference| {difference:g}"


def _facts(source: Source, form: str, to: Path) -> Facts:
    found: dict[str, Any] = read_run(source.run)
    if source.kind == "adapter":
        found["adapter"] = json.loads((source.folder / SETTINGS).read_text(encoding="utf-8"))
    config = to / "config.json"
    architectures: list[str] = []
    if config.is_file():
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    base = source.base_spec().name if source.base_known else str(source.folder)
    return Facts(form, base, architectures[0] if architectures else "", **found)
