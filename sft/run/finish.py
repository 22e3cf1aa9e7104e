"""The end of a run: its adapter saved, its merged model written and proven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.class_names import write_labels
from sft.errors import UserError
from sft.export.card import Facts, read_run, write_card
from sft.export.loaded import cast_of
from sft.export.merged import export_merged, logits_of, merge, merging_bound, verify_merged
from sft.export.quantized import export_quantized
from sft.quantization import is_quantized, write_record
from sft.run import folder as run_folder
from sft.tasks.find import has_classes
from sft.whole import written_whole

if TYPE_CHECKING:
    from sft.run.job import Job


def save_adapter(job: Job) -> None:
    """Write the adapter, with the tokenizer it was trained with."""
    folder = job.output / run_folder.ADAPTER
    with job.phases.phase("save"), written_whole(folder) as temporary:
        job.model.save_pretrained(temporary)
        job.processor.save_pretrained(temporary)
        write_record(temporary, job.recipe.model)
        config: Any = getattr(job.model, "config", None)
        if has_classes(job.task) and config.problem_type != "regression":
            write_labels(temporary, config)
        job.phases.note(f"adapter in {folder}")


def export(job: Job) -> float | None:
    """Write the merged folder and prove that it is the trained model.

    Returns:
        the largest |logit difference| between the folder, reloaded, and the trained model; None
        where nothing is exported or verified.
    """
    if not job.recipe.export.merged:
        return None
    folder, batches, spec = job.output / run_folder.MERGED, job.probe(), job.recipe.export
    dtype = cast_of(spec.dtype)
    if is_quantized(job.model):
        return _export_quantized(job, folder, batches, dtype)
    with job.method.trained(job.model):
        expected = logits_of(job.model, batches)
    bound = merging_bound(job.model, expected)
    if dtype is not None:  # rounding is what was asked for: compare what was rounded
        job.model = merge(job.model, dtype)
        expected, bound = logits_of(job.model, batches), 0.0
    found: list[float] = []

    def check(written: Path) -> None:
        found.append(verify_merged(written, batches, expected, bound=bound))

    with job.phases.phase("export"):
        export_merged(
            job.model, job.processor, folder, check=check if spec.verify else None,
            max_shard_size=spec.max_shard_size,
        )  # fmt: skip
        proof = f"; reloaded: max |logit difference| {found[0]:g}" if found else ""
        job.phases.note(f"merged model in {folder}{proof}")
    return found[0] if found else None


def export_also(job: Job) -> None:
    """Write the other forms that the recipe names, each from what the run has saved."""
    spec = job.recipe.export
    for form in spec.also:
        from sft.export.forms import Request
        from sft.export.forms import export as write

        request = Request(
            to=job.output / form, base=job.recipe.model.name, overwrite=True, verify=spec.verify,
            rank=spec.rank, max_error=spec.max_error, gguf_type=spec.gguf_type,
            quantized=_packing(job, form),
        )  # fmt: skip
        with job.phases.phase(form):
            told = write(_source(job, form), form, request, _printer(job))
            job.phases.note(told)


def publish(job: Job) -> None:
    """Write the model cards, which tell what run.json holds; upload what the recipe says."""
    spec, base = job.recipe.export, job.recipe.model.name
    for name in (run_folder.ADAPTER, run_folder.MERGED):
        folder = job.output / name
        if folder.is_dir():
            kind = type(getattr(job.model, "get_base_model", lambda: job.model)()).__name__
            write_card(folder, Facts(name, base, kind, **read_run(job.output)), job.output.name)
    if spec.push_to_hub is not None:
        from sft.export.hub import push

        pushed = job.output / (run_folder.MERGED if spec.merged else run_folder.ADAPTER)
        with job.phases.phase("upload"):
            key = "export.push_to_hub"
            job.phases.note(push(pushed, spec.push_to_hub, private=spec.private, key=key))


def _source(job: Job, form: str) -> Path:
    """Return what a form is made from: what is exact for it, and nearest to it."""
    merged, adapter = job.output / run_folder.MERGED, job.output / run_folder.ADAPTER
    if form == "gguf" and merged.is_dir() and job.recipe.export.quantized != "requantize":
        return merged
    return adapter if adapter.is_dir() else merged


def _packing(job: Job, form: str) -> str | None:
    """Return what is merged into, for a form that is made from an adapter over a packed base."""
    from_adapter = _source(job, form).name == run_folder.ADAPTER
    if job.recipe.model.quantization is None or form in ("lora", "shira") or not from_adapter:
        return None
    return "reference" if job.recipe.export.quantized == "reference" else "dequantize"


def _printer(job: Job) -> Callable[[str], None]:
    return lambda line: job.console.print(line, highlight=False, soft_wrap=True, markup=False)


def _export_quantized(
    job: Job, folder: Path, batches: Any, dtype: torch.dtype | None
) -> float | None:
    """Merge over a packed base in the way asked for, and say what that changed."""
    plain = job.recipe.model.model_copy(update={"quantization": None})
    with job.phases.phase("export"):
        difference, error = export_quantized(
            job.model, job.processor, folder, job.recipe.export.quantized, batches,
            verify=job.recipe.export.verify, dtype=dtype,
            reference=lambda: job.task.load_model(plain, job.data, None),
        )  # fmt: skip
        proof = "" if difference is None else f"; reloaded: max |logit difference| {difference:g}"
        job.phases.note(f"merged model in {folder}{proof}")
    for line in error.lines():
        _printer(job)(line)
    return difference


def trained_parts(job: Job) -> dict[str, Any] | None:
    """Return run.json's section `support`: what was trained where, read from what was saved."""
    from sft.tools.describe import describe

    try:
        return describe(str(job.output), job.recipe.model.name)
    except UserError:  # nothing was saved, or what has no form of changed weights, such as a prompt
        return None


def report(job: Job) -> None:
    """Write the run's page and plots, from what its folder holds."""
    from sft.report.write import write_report

    with job.phases.phase("report"):
        job.phases.note("; ".join(write_report(job.output)))
