"""Where rows were read: what a message about one of them says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.data.by_hand import LINES, read_lines
from sft.data.canonical import Piece
from sft.data.columns import MADE, renamed, renamed_row
from sft.data.formats import KNOWN
from sft.data.source import open_source
from sft.data.spec import SourceSpec


@dataclass(frozen=True)
class Origin:
    """The sources of some rows.

    Args:
        key: of the recipe, or option of the command line, that names them.
        sources: that they were read from.
    """

    key: str
    sources: tuple[SourceSpec, ...]

    def place(self, format: str, column: str, value: Any) -> str:
        """Return key, file and line of the first row with a value, which is looked up anew.

        Args:
            format: of the rows.
            column: as the task calls it.
            value: in the column, or in the list that it holds.
        """
        for source in self.sources:
            for piece in open_source(source, self.key):
                for line, found in _column(piece, source, format, column):
                    if str(value) in map(str, found if isinstance(found, list) else [found]):
                        return f"{self.key}: {piece.name}:{line}"
        return ": ".join([self.key, *(source.path for source in self.sources[:1])])


def _column(piece: Piece, source: SourceSpec, format: str, column: str) -> Any:
    """Yield lines, or numbers of examples, with what a column holds there."""
    group = next(group for group in KNOWN[format].needed if group[0] == column)
    if piece.path is not None and piece.path.suffix in LINES:
        for line, row in read_lines(piece.path):
            if not isinstance(row, str):
                row = renamed_row(row, source.columns)
                yield line, next((row[name] for name in group if name in row), None)
        return
    rows = renamed(piece.rows, source.columns, piece.name)
    name = next(name for name in group if name in rows.column_names)
    found = by_name(rows.select_columns([name]))[name]
    yield from ((f" example {number}", value) for number, value in enumerate(found, 1))


def by_name(rows: Any) -> Any:
    """Return rows whose classes are names: numbers are of a data set's own order."""
    from datasets import ClassLabel, List, Value

    for name, kind in list(rows.features.items()):
        inner = getattr(kind, "feature", kind)
        if isinstance(inner, ClassLabel):
            names = [None if value is None else inner.int2str(value) for value in rows[name]]
            text = Value("string") if inner is kind else List(Value("string"))
            rows = rows.add_column(MADE + name, names, feature=text).remove_columns([name])
            rows = rows.rename_column(MADE + name, name)
    return rows
