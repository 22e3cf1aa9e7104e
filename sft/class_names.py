"""The names of classes beside an adapter, whose base knows nothing of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft.errors import UserError, one_line

LABELS = "labels.json"


def write_labels(folder: Path, config: Any) -> None:
    """Note the classes of a model's head, in order."""
    names = [config.id2label[number] for number in range(config.num_labels)]
    (folder / LABELS).write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")


def read_labels(folder: Path) -> list[str] | None:
    """Return the names of the classes, or None where none were noted.

    Raises:
        UserError: the note is damaged.
    """
    path = folder / LABELS
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("expected a list of names")
    except ValueError as error:
        text = f"{path}: is damaged ({one_line(error)}); remove it, or write it again"
        raise UserError(text) from error
    return names
