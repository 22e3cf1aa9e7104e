"""Rows as a task takes them: columns renamed, each row checked, formats turned into others."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sft.data.bad_rows import BadRows
from sft.data.by_hand import LINES, row_lines
from sft.data.files import quiet
from sft.data.formats import KNOWN, Format
from sft.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Rows of one file, or of what has no files.

    Args:
        name: of the file or source, for messages.
        rows: a datasets.Dataset, or None where a file has to be read line by line.
        path: of the file, if it is one.
    """

    name: str
    rows: Any
    path: Path | None = None

    def line(self, index: int) -> tuple[int, str]:
        """Return the line of a row, and what is counted if it is not lines."""
        if self.path is None or self.path.suffix not in LINES:
            return index + 1, "example "
        return next(islice(row_lines(self.path), index, None)), ""


def canonicalise(piece: Piece, format: str, bad: BadRows, *, chat: bool) -> Any:
    """Return the rows of a piece as tasks take its format.

    Args:
        piece: its columns are renamed.
        format: that its columns spell.
        bad: told of malformed rows.
        chat: whether the task reads conversations.

    Raises:
        UserError: there are images, and nothing to open them with.
    """
    kind = KNOWN[format]
    needed = kind.chosen(piece.rows.column_names)
    assert needed is not None
    rows = piece.rows.select_columns([*needed, *kind.kept(piece.rows.column_names)])
    wanted = [group[0] for group in kind.needed]
    rows = rows.rename_columns(
        {theirs: ours for theirs, ours in zip(needed, wanted, strict=True) if theirs != ours}
    )
    if format == "image_classification":
        _check_pillow(bad.key)
        rows = _images(rows, piece)
    if not (kind.texts and _texts_alone(rows, wanted)):
        rows = _checked(rows, piece, kind, bad, chat)
    if kind.convert is None or len(rows) == 0:
        return rows
    with quiet():  # a cache would outlive a change of ours to the format
        return rows.map(
            kind.convert,
            fn_kwargs={"chat": chat},
            remove_columns=rows.column_names,
            load_from_cache_file=False,
        )


def _checked(rows: Any, piece: Piece, kind: Format, bad: BadRows, chat: bool) -> Any:
    """Return the rows that pass the format's check."""
    good = []
    for index, row in enumerate(_undecoded(rows)):
        try:
            kind.check(row, chat)
        except ValueError as error:
            line, unit = piece.line(index)
            bad.found(piece.name, line, error, unit=unit)
        else:
            good.append(index)
    return rows if len(good) == len(rows) else rows.select(good)


def _texts_alone(rows: Any, columns: list[str]) -> bool:
    """Whether the columns hold texts, every one of them there; seen without reading a row."""
    table = rows.data
    return all(
        getattr(rows.features[name], "dtype", None) in ("string", "large_string")
        and table.column(name).null_count == 0
        for name in columns
    )


def _check_pillow(key: str) -> None:
    if importlib.util.find_spec("PIL") is None:
        raise UserError(f'{key}: images need the package pillow: pip install "sparse-sft[image]"')


def _images(rows: Any, piece: Piece) -> Any:
    """Read a column of paths as images; they are relative to the file that names them."""
    from datasets import Image, Value

    if not isinstance(rows.features["image"], Value):
        return rows
    folder = piece.path.parent if piece.path is not None else Path()
    with quiet():
        rows = rows.map(
            lambda row: {"image": row["image"] and str(folder / row["image"])},
            load_from_cache_file=False,
        )
    return rows.cast_column("image", Image())


def _undecoded(rows: Any) -> Any:
    """Return the rows with images left in their files."""
    from datasets import Image

    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows
