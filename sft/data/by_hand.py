"""Files of rows read line by line: where a line is wrong, and all the others."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINES = (".jsonl", ".csv", ".tsv", ".txt")  # endings of files that are read so

csv.field_size_limit(2**31 - 1)  # of one cell; the default would refuse long documents


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield each row with the line that it begins on; of a wrong one, what is wrong.

    Args:
        path: of a file whose ending is one of `LINES`.
    """
    if path.suffix == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix == ".txt":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, {"text": line.rstrip("\r\n")}
    else:
        yield from _cells(path)


def row_lines(path: Path) -> Iterator[int]:
    """Yield the line that each row begins on, counted as `datasets` counts rows."""
    return (number for number, _ in read_lines(path))


def delimiter(path: Path) -> str:
    """Return what separates the cells of a file."""
    return "\t" if path.suffix == ".tsv" else ","


def header(path: Path) -> list[str]:
    """Return the names of the columns."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file, delimiter=delimiter(path)), [])


def typed(name: str, value: str) -> Any:
    """Return a cell: text, unless it is a label or an answer that is a number."""
    if name not in ("label", "answer"):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield number, "not UTF-8 text"
            except json.JSONDecodeError as error:
                yield number, f"not valid JSON ({error.msg}, column {error.colno})"
            else:
                kind = type(row).__name__
                whole = isinstance(row, dict)
                yield number, row if whole else f"expected one JSON object a line, found {kind}"


def _cells(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the rows of a table; an empty cell is a value that is missing."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter(path))
        names = next(reader, [])
        begins = reader.line_num + 1
        for cells in reader:
            line, begins = begins, reader.line_num + 1
            if not cells:
                continue
            if len(cells) > len(names):
                yield line, f"{len(cells)} cells for {len(names)} columns"
                continue
            pairs = zip(names, cells, strict=False)
            yield line, {name: typed(name, cell) if cell else None for name, cell in pairs}
