"""Examples that are read while a model trains, and never all held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft.data.bad_rows import BadRows
from sft.data.by_hand import LINES, read_lines
from sft.data.cmudict import EMBEDDED, load_embedded
from sft.data.columns import check_columns, renamed_row
from sft.data.equal import key_of
from sft.data.files import BUILDERS, quiet
from sft.data.formats import KNOWN, detect_format
from sft.data.source import cannot, is_saved, local_files, locate
from sft.data.spec import SourceSpec
from sft.errors import UserError

LOOKED_AT = 100  # rows whose columns tell the format
COUNTED = ("classification", "token_classification", "image_classification")


class Stream:
    """The rows of a source as a task takes them; reads from the start whenever it is iterated.

    Args:
        source: where to read.
        bad: told of malformed rows, once each time they are read.
        formats: those that the task takes, or None.
        at_once: all rows are read before training.
    """

    def __init__(
        self,
        source: SourceSpec,
        bad: BadRows,
        formats: Sequence[str] | None,
        *,
        at_once: bool = False,
    ) -> None:
        self.source, self.bad = source, bad
        self.files = None if source.path in EMBEDDED else local_files(source, bad.key)
        self.held_out: set[bytes] = set()
        self.chat = formats is None or "messages" in formats
        there = self._columns()
        check_columns(source.columns, there, source.path)
        columns = list(renamed_row(dict.fromkeys(there), source.columns))
        self.written = detect_format(columns, source.path, source.format, formats, source.columns)
        if self.written in COUNTED and not at_once:
            raise UserError(
                f"data.streaming: got true with {self.written} examples, whose labels must be "
                "known at once; set it to false"
            )
        self.format = KNOWN[self.written].becomes or self.written

    def __iter__(self) -> Iterator[dict[str, Any]]:
        kind, source_columns = KNOWN[self.written], self.source.columns
        for name, line, row in self._raw():
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                row = renamed_row(row, source_columns)
                chosen = kind.chosen(row)
                if chosen is None:
                    chosen = [group[0] for group in kind.needed]  # whose check says what lacks
                kept = {key: row[key] for key in kind.kept(row)}
                pairs = zip(kind.needed, chosen, strict=True)
                row = {ours[0]: row.get(theirs) for ours, theirs in pairs} | kept
                kind.check(row, self.chat)
            except ValueError as error:
                lines = name.endswith(LINES) and self.files is not None
                self.bad.found(name, line, error, unit="" if lines else "example ")
                continue
            found = row if kind.convert is None else kind.convert(row, self.chat)
            if not self.held_out or key_of(found) not in self.held_out:
                yield found

    def dataset(self, seed: int, buffer: int) -> Any:
        """Return a datasets.IterableDataset of the rows, shuffled by seed within a buffer."""
        from datasets import IterableDataset

        rows = IterableDataset.from_generator(_rows, gen_kwargs={"stream": self})
        fraction = self.source.fraction
        if fraction is not None:
            raise UserError(
                f"data.train: {self.source.path}: got fraction with streaming, which counts no "
                "rows; set examples"
            )
        if self.source.examples is not None:
            rows = rows.take(self.source.examples)
        return rows.shuffle(seed=seed, buffer_size=buffer)

    def _columns(self) -> list[str]:
        """Return the columns of the first rows: one alone may lack some."""
        wrong: list[tuple[str, int, str]] = []
        found: dict[str, Any] = {}
        good = 0
        for name, line, row in self._raw():
            if isinstance(row, str):
                wrong.append((name, line, row))
                continue
            found |= row
            good += 1
            if good == LOOKED_AT:
                break
        if not found:
            for name, line, reason in wrong[:1]:
                self.bad.found(name, line, reason)
            raise UserError(f"{self.bad.key}: {self.source.path}: holds no examples")
        return list(found)

    def _raw(self) -> Iterator[tuple[str, int, dict[str, Any] | str]]:
        """Yield the name of a file, a line of it, and its row, or what is wrong there."""
        if self.files is None:
            rows = _of_no_file(self.source, self.bad.key)
            yield from ((self.source.path, number, row) for number, row in enumerate(rows, 1))
            return
        for path in self.files:
            if path.suffix in LINES:
                yield from ((str(path), line, row) for line, row in read_lines(path))
            else:
                rows = _of_file(path, self.bad.key)
                yield from ((str(path), number, row) for number, row in enumerate(rows, 1))


def _rows(stream: Stream) -> Iterator[dict[str, Any]]:
    yield from stream


def _of_file(path: Path, key: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        with quiet():
            yield from datasets.load_dataset(
                BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True
            )
    except (OSError, ValueError) as error:
        raise cannot(key, str(path), error) from error


def _of_no_file(source: SourceSpec, key: str) -> Iterator[dict[str, Any]]:
    """Read embedded words, a saved data set, or one of the hub."""
    import datasets

    if source.path in EMBEDDED:
        yield from load_embedded(source.path)[0]
        return
    name, config, split = locate(source)
    if is_saved(Path(name)):
        raise UserError(
            f"data.streaming: {source.path}: a saved data set lies on disk as it is; set it to "
            "false"
        )
    try:
        with quiet():
            yield from datasets.load_dataset(
                name, config, split=split, revision=source.revision, streaming=True
            )
    except Exception as error:
        raise cannot(key, source.path, error) from error
