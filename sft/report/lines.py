"""Lines of a run's log: written, read back, and cut where a resumed run goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def to_line(content: Line) -> str:
    """Return a line of JSON; a number that is not finite is null, as JSON knows none."""
    return json.dumps({key: _plain(value) for key, value in content.items()}) + "\n"


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a log, without a last one that was cut short; none if there is no log."""
    if not path.is_file():
        return []
    found: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def keep_until(path: Path, step: int) -> list[Line]:
    """Cut a log back to what was written up to an update, and return that.

    Args:
        path: the log; it need not exist.
        step: the update that training goes on from; 0 begins anew.
    """
    kept = [
        line
        for line in (read_lines(path) if step else [])
        if line["step"] <= step and line.get("event") != "ended"
    ]
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("".join(map(to_line, kept)), encoding="utf-8")
    os.replace(temporary, path)
    return kept


def _plain(value: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    try:
        number = float(value)  # NumPy's, and tensors of one entry
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None
