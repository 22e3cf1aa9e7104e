"""Files of rows read line by line: where a line is wrong, and all the others."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

LINES = (".jsonl", ".csv", ".tsv", ".txt")  # endings of files that are read so
NOT_TEXT = "not UTF-8 text"

csv.field_size_limit(2**31 - 1)  # of one cell; the default would refuse long documents


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield each row with the line that it begins on; of a wrong one, what is wrong.

    Args:
        path: of a file whose ending is one of `LINES`.
    """
    if path.suffix == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix == ".txt":
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = {"text": line.rstrip("\r\n")}
                    yield number, row if _is_text(line) else NOT_TEXT
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


def wrong_names(names: list[str]) -> str | None:
    """Say what is wrong with the names of columns, if anything is."""
    if not all(map(_is_text, names)):
        return NOT_TEXT
    twice = [name for name in names if names.count(name) > 1]
    return f"two columns are called {twice[0]!r}" if twice else None


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
                yield number, NOT_TEXT
            except json.JSONDecodeError as error:
                yield number, f"not valid JSON ({error.msg}, column {error.colno})"
            except RecursionError:
                yield number, "not valid JSON (lists or objects too deep in one another)"
            except ValueError:  # Python reads no longer ones
                yield number, "not valid JSON (a number of thousands of digits)"
            else:
                kind = type(row).__name__
                if not isinstance(row, dict):
                    yield number, f"expected one JSON object a line, found {kind}"
                elif b"\\" in raw and not _is_text(json.dumps(row, ensure_ascii=False)):
                    yield number, "half a character (one \\ud... escape of a pair) is no text"
                else:
                    yield number, row


def _cells(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the rows of a table; an empty cell, or none, is a value that is missing."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter(path))
        names = next(reader, [])
        if (wrong := wrong_names(names)) is not None:
            yield 1, wrong
            return
        begins = reader.line_num + 1
        for cells in reader:
            line, begins = begins, reader.line_num + 1
            if not cells:
                continue
            if len(cells) > len(names):
                yield line, f"{len(cells)} cells for {len(names)} columns"
            elif not all(map(_is_text, cells)):
                yield line, NOT_TEXT
            else:
                pairs = zip_longest(names, cells, fillvalue="")
                yield line, {name: typed(name, cell) if cell else None for name, cell in pairs}


def _is_text(value: str) -> bool:
    """Whether a value can be written: bytes that were none, and halves of pairs, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
