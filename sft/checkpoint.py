"""The state of a sparse method beside a Trainer checkpoint, and the mark of a whole checkpoint.

`sft_state.safetensors` holds the tensors that continue the run (open windows), `sft_state.json` the
step, the versions, hashes of support and base, and the size of every other file. The JSON is
written last: a checkpoint without it, or whose files differ from it, was cut short.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

TENSORS, MARK = "sft_state.safetensors", "sft_state.json"
FORMAT = 1


def save_state(folder: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Complete the checkpoint in `folder`: write tensors, then the mark with `notes`.

    Args:
        folder: holds what the Trainer has written.
        tensors: what `load_state` gives back.
        notes: plain values kept in the mark.
    """
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors refuses two names for one storage
    flat = {name: tensor.clone() for name, tensor in flat.items()}
    safetensors.torch.save_file(flat, folder / TENSORS, metadata={"format": "pt"})
    # adapters that aren't called "default" lie in folders of their own
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARK
    }
    content = json.dumps({"format": FORMAT, **notes, "files": files}, indent=1, default=str)
    temporary = folder / f".{MARK}"
    temporary.write_text(content)
    os.replace(temporary, folder / MARK)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the notes of a whole checkpoint.

    Raises:
        ValueError: the checkpoint is not whole (see `check_whole`).
    """
    notes = check_whole(folder)
    return safetensors.torch.load_file(folder / TENSORS), notes


def check_whole(folder: Path) -> dict[str, Any]:
    """Return the notes of a checkpoint, after checking that every file of it is there.

    Raises:
        ValueError: the mark is missing, damaged or of another format, names a file that is missing
            or of another size, or says that the optimizer's state was not saved.
    """
    if not folder.is_dir():
        raise ValueError(f"resume_from_checkpoint: {folder} is not a folder")
    mark = folder / MARK
    if not mark.is_file():
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no {MARK}, so it was cut short or not written "
            "by SparseTrainer; resume from an earlier checkpoint"
        )
    try:
        notes: dict[str, Any] = json.loads(mark.read_text())
    except ValueError as error:
        raise ValueError(
            f"resume_from_checkpoint: {mark} is damaged ({error}); resume from another checkpoint"
        ) from error
    if notes.get("format") != FORMAT:
        raise ValueError(
            f"resume_from_checkpoint: {mark} has format {notes.get('format')}, allowed is {FORMAT}"
        )
    for name, size in notes["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(
                f"resume_from_checkpoint: {path} has {found} bytes, {size} were written; the "
                "checkpoint is damaged, resume from another"
            )
    if not notes.get("resumable", True):
        raise ValueError(
            f"resume_from_checkpoint: {folder} was saved with save_only_model=True, without the "
            "optimizer's state; load its adapter with PeftModel.from_pretrained instead"
        )
    return notes


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint folder that is whole, or None."""
    pattern = re.compile(r"checkpoint-(\d+)$")
    found = [p for p in output_dir.glob("checkpoint-*") if pattern.search(p.name)]
    for folder in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            check_whole(folder)
        except ValueError:
            continue
        return folder
    return None
