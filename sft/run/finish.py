"""The end of a run: its adapter saved, its merged model written and proven."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.export.merged import export_merged, logits_of, merging_bound, verify_merged
from sft.export.quantized import export_quantized
from sft.quantization import is_quantized, write_record
from sft.run import folder as run_folder
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
        job.phases.note(f"adapter in {folder}")


def export(job: Job) -> float | None:
    """Write the merged folder and prove that it is the trained model.

    Returns:
        the largest |logit difference| between the folder, reloaded, and the trained model; None
        where nothing is exported or verified.
    """
    if not job.recipe.export.merged:
        return None
    folder, batches = job.output / run_folder.MERGED, job.probe()
    if is_quantized(job.model):
        return _export_quantized(job, folder, batches)
    with job.method.trained(job.model):
        expected = logits_of(job.model, batches)
    bound = merging_bound(job.model, expected)
    found: list[float] = []

    def check(written: Path) -> None:
        found.append(verify_merged(written, batches, expected, bound=bound))

    verify = check if job.recipe.export.verify else None
    with job.phases.phase("export"):
        export_merged(job.model, job.processor, folder, check=verify)
        proof = f"; reloaded: max |logit difference| {found[0]:g}" if found else ""
        job.phases.note(f"merged model in {folder}{proof}")
    return found[0] if found else None


def _export_quantized(job: Job, folder: Path, batches: Any) -> float | None:
    """Merge over a packed base in the way asked for, and say what that changed."""
    plain = job.recipe.model.model_copy(update={"quantization": None})
    with job.phases.phase("export"):
        difference, error = export_quantized(
            job.model, job.processor, folder, job.recipe.export.quantized, batches,
            verify=job.recipe.export.verify,
            reference=lambda: job.task.load_model(plain, job.data, None),
        )  # fmt: skip
        proof = "" if difference is None else f"; reloaded: max |logit difference| {difference:g}"
        job.phases.note(f"merged model in {folder}{proof}")
    for line in error.lines():
        job.console.print(line, highlight=False, soft_wrap=True, markup=False)
    return difference
