"""Read a file of examples through `datasets`, with errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft.errors import UserError, one_line

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_file(key: str, name: str) -> Any:
    """Read a file into a datasets.Dataset.

    Args:
        key: The recipe key that names the file; messages start with it.
        name: Path of the file; its ending names the format.
    """
    import datasets

    path = Path(name).expanduser()
    if path.suffix not in BUILDERS:
        allowed = ", ".join(BUILDERS)
        raise UserError(f"{key}: got {name!r}; expected a file ending in {allowed}, or 'cmudict'")
    if not path.is_file():
        raise UserError(f"{key}: {name}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{key}: {name}: the file is empty")
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        builder = BUILDERS[path.suffix]
        found = datasets.load_dataset(builder, data_files=str(path), split="train")
    except Exception as error:
        bad = _bad_json_line(path) if path.suffix in (".jsonl", ".json") else None
        raise UserError(f"{key}: {bad or f'{name}: cannot be read ({_cause(error)})'}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    if path.suffix == ".txt":
        found = found.filter(lambda row: bool(row["text"].strip()))
    if len(found) == 0:
        raise UserError(f"{key}: {name}: the file holds no examples")
    return found


def _bad_json_line(path: Path) -> str | None:
    """Name the first line that is not a JSON object, or None when all of them are."""
    with path.open(encoding="utf-8", errors="replace") as file:
        if file.read(1) == "[":  # one JSON document, not one a line
            return None
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return f"{path}:{number}: not valid JSON ({error.msg}, column {error.colno})"
            if not isinstance(row, dict):
                kind = type(row).__name__
                return f"{path}:{number}: expected one JSON object a line, found {kind}"
    return None


def _cause(error: BaseException) -> str:
    """Return the message of the innermost error; the outer ones only say that reading failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)[:200]
