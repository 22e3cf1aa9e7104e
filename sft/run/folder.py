"""The folder of a run: what it holds, when it may be written, where training goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sft.errors import UserError

ADAPTER, MERGED, RECORD, RECIPE = "adapter", "merged", "run.json", "recipe.yaml"
FORMS = ("lora", "shira", "patch", "gguf")  # what export.also names
ZEROTH_ORDER = "zeroth_order"  # log and start of a run by forward passes
STEPS = ("checkpoint-", "stage-")  # what a run leaves on its way
LOG, REPORT, PLOTS = "log.jsonl", "report.html", "plots"


def check(folder: Path, *, resume: str | None, overwrite: bool) -> str | None:
    """See whether a run may write here, and return the checkpoint to go on from, if any.

    Args:
        folder: `training.output_dir`.
        resume: `training.resume_from_checkpoint`: a path, "auto" (the latest one here), or None.
        overwrite: A former run may be replaced.

    Raises:
        UserError: When the folder holds a run and neither `overwrite` nor a resume was asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"training.output_dir: {folder}: is a file; give a folder")
    checkpoint = _checkpoint(folder, resume)
    former = _run_files(folder)
    if former and checkpoint is None and not overwrite:
        if resume is not None:
            raise UserError(
                f"training.resume_from_checkpoint: {resume}: {folder} holds a run "
                f"({former[0].name}) without a whole checkpoint; set overwrite: true, or give "
                "another folder"
            )
        raise UserError(
            f"training.output_dir: {folder}: already holds a run ({former[0].name}); "
            "set overwrite: true, training.resume_from_checkpoint: auto, or another folder"
        )
    return checkpoint


def clear(folder: Path, *, keep_checkpoints: bool) -> None:
    """Make the folder, and remove a former run's files from it; other files stay.

    Args:
        folder: `training.output_dir`.
        keep_checkpoints: A former run goes on: its checkpoints, stages and log stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = [path for name in (LOG, REPORT, PLOTS) if (path := folder / name).exists()]
    for path in (*_run_files(folder), *told):
        if not (keep_checkpoints and path.name.startswith((*STEPS, ZEROTH_ORDER, LOG))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json, whole or not at all."""
    temporary = folder / f".{RECORD}"
    temporary.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, folder / RECORD)


def _run_files(folder: Path) -> list[Path]:
    """List what an earlier run left in the folder; a recipe alone is no loss."""
    names = [folder / name for name in (RECORD, ADAPTER, MERGED, *FORMS, ZEROTH_ORDER)]
    steps = (path for start in STEPS for path in sorted(folder.glob(f"{start}*")))
    return [*(path for path in names if path.exists()), *steps]


def _checkpoint(folder: Path, resume: str | None) -> str | None:
    """Return the checkpoint that `resume` names."""
    if resume is None:
        return None
    if resume == "auto":
        from sft.checkpoint import last_whole_checkpoint

        newest = last_whole_checkpoint(folder)
        return None if newest is None else str(newest)
    if not Path(resume).is_dir():
        raise UserError(f"training.resume_from_checkpoint: {resume}: no such folder; or use auto")
    return resume
