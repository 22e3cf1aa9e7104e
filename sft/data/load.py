"""Training and held-out examples of a recipe: read, recognised, mixed, split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from sft.data import rows as row_rules
from sft.data.bad_rows import BadRows
from sft.data.canonical import canonicalise
from sft.data.cmudict import EMBEDDED, load_embedded
from sft.data.columns import renamed
from sft.data.equal import keys, without
from sft.data.files import cause, quiet
from sft.data.formats import canonical, detect_format
from sft.data.mix import Part, held_out_of, limited, mixed, weights
from sft.data.origin import Origin, by_name
from sft.data.source import open_source
from sft.data.spec import DataSpec, SourceSpec
from sft.data.streaming import Stream
from sft.errors import UserError


@dataclass(frozen=True)
class Examples:
    """What a run trains on and is measured on; `held_out` may be None.

    Args:
        train: a datasets.Dataset, or an IterableDataset where it is streamed.
        held_out: a datasets.Dataset.
        format: of both, as tasks take it.
        sources: of the training examples: path, format, rows, weight.
        bad: rows that were left out of the training examples, and of those held out.
        dropped: training examples that were equal to a held-out one.
        train_at: where the training examples were read.
        held_out_at: where those held out were.
    """

    train: Any
    held_out: Any | None
    format: str
    sources: tuple[dict[str, Any], ...] = ()
    bad: tuple[BadRows, ...] = field(default=(), compare=False)
    dropped: int = 0
    train_at: Origin | None = field(default=None, compare=False)
    held_out_at: Origin | None = field(default=None, compare=False)

    @property
    def streamed(self) -> bool:
        """Whether the training examples are read while a model trains."""
        return not hasattr(self.train, "__len__")

    def first(self, count: int) -> Any:
        """Return the first training examples, at most so many, as a datasets.Dataset."""
        from datasets import Dataset

        if self.streamed:
            return Dataset.from_list(list(self.train.take(count)))
        return self.train.select(range(min(count, len(self.train))))


def load_data(
    spec: DataSpec, seed: int, formats: Sequence[str] | None = None, *, key: str = "data.train"
) -> Examples:
    """Load the examples of a recipe; the held-out ones are never trained on.

    Args:
        spec: The `data:` section.
        seed: Decides which examples are held out, and the order of mixed ones.
        formats: those that the task takes; default: any that `sft.data.formats` knows.
        key: that names the training examples in messages, where it is no recipe's.

    Raises:
        UserError: When a file is missing, malformed, empty, or has no columns that we know.
    """
    bad = BadRows(key, spec.on_bad_row), BadRows("data.eval", spec.on_bad_row)
    if spec.streaming:
        return _streamed(spec, seed, formats, bad)
    sources = spec.sources("train")
    parts = [_read(source, bad[0], formats) for source in sources]
    parts = [limited(part, seed, index) for index, part in enumerate(parts)]
    parts = _held_out(_alike(parts), spec, seed)
    held_out = _joined([part.held_out for part in parts if part.held_out is not None])
    if spec.eval is not None:
        held_out = _apart(spec, parts[0].format, formats, bad[1])
    dropped, kept = 0, []
    names = ", ".join(source.path for source in sources)
    for part in parts:
        left, count = without(part.rows, held_out, names)
        dropped += count
        kept.append(replace(part, rows=left))
    train = mixed([part.rows for part in kept], sources, spec, seed)
    if spec.train_examples is not None:
        train = train.select(range(min(spec.train_examples, len(train))))
    if held_out is not None and held_out.features != train.features:
        held_out = by_name(held_out)
    at = Origin(key, tuple(sources))
    apart = at if spec.eval is None else Origin("data.eval", tuple(spec.sources("eval")))
    noted = _noted(sources, kept)
    return Examples(train, held_out, parts[0].format, noted, bad, dropped, at, apart)


def _read(source: SourceSpec, bad: BadRows, formats: Sequence[str] | None) -> Part:
    """Read a source file by file; all of its files have the same format."""
    chat, found, names = formats is None or "messages" in formats, [], []
    for piece in open_source(source, bad.key):
        if piece.rows is None:
            rows, name = _by_lines(source.model_copy(update={"path": piece.name}), bad, formats)
        else:
            piece = replace(piece, rows=renamed(piece.rows, source.columns, piece.name))
            given = (list(piece.rows.column_names), piece.name, source.format)
            written = detect_format(*given, formats, source.columns)
            rows, name = canonicalise(piece, written, bad, chat=chat), canonical(written)
        found.append(rows)
        names.append(name)
    if len(set(names)) > 1:
        raise UserError(
            f"{bad.key}: {source.path}: files of {' and '.join(sorted(set(names)))}; give each a "
            "source of its own"
        )
    rows = _joined(found)
    if len(rows) == 0:
        raise UserError(f"{bad.key}: {source.path}: no example is left: all rows are malformed")
    return Part(source, rows, names[0])


def _by_lines(source: SourceSpec, bad: BadRows, formats: Sequence[str] | None) -> tuple[Any, str]:
    """Read a file in which something is malformed; return its other rows, and their format."""
    from datasets import Dataset

    stream = Stream(source, bad, formats, at_once=True)
    rows = list(stream)
    try:
        return Dataset.from_list(rows), stream.format
    except (ValueError, TypeError, OverflowError) as error:  # Arrow's are among them
        raise UserError(
            f"{bad.key}: {source.path}: values of one column are of several types "
            f"({cause(error)}); write them alike"
        ) from error


def _alike(parts: list[Part]) -> list[Part]:
    """Give all parts the same format: conversations become `messages`, others must agree."""
    formats = {part.format for part in parts}
    if formats == {"messages", "prompt_completion"}:
        parts = [part if part.format == "messages" else _as_messages(part) for part in parts]
        formats = {part.format for part in parts}
    if len(formats) > 1:
        listed = "; ".join(f"{part.source.path}: {part.format}" for part in parts)
        raise UserError(f"data.train: sources of several formats ({listed}); write them alike")
    return parts


def _as_messages(part: Part) -> Part:
    """Join prompts and completions that are lists of messages; texts stay as they are."""
    if not hasattr(part.rows.features["prompt"], "feature"):
        return part
    with quiet():
        rows = part.rows.map(
            row_rules.to_messages,
            fn_kwargs={"chat": True},
            remove_columns=["prompt", "completion"],
            load_from_cache_file=False,
        )
    return replace(part, rows=rows, format="messages")


def _held_out(parts: list[Part], spec: DataSpec, seed: int) -> list[Part]:
    """Hold out what the recipe says; embedded words bring their own."""
    embedded = [part.source.path for part in parts if part.source.path in EMBEDDED]
    if not embedded:
        return held_out_of(parts, spec, seed)
    for key in ("eval", "eval_fraction"):
        if len(parts) == 1 and getattr(spec, key) is not None:
            raise UserError(
                f"data.{key}: {embedded[0]!r} brings its own held-out words; remove the key"
            )
    if len(parts) > 1:
        return held_out_of(parts, spec, seed)
    return [replace(parts[0], held_out=_embedded_words(spec))]


def _embedded_words(spec: DataSpec) -> Any:
    """Return the held-out words of embedded data, which are fixed in the file."""
    (source,) = spec.sources("train")
    held_out = load_embedded(source.path)[1]
    if spec.eval_examples is not None:
        held_out = held_out.select(range(min(spec.eval_examples, len(held_out))))
    return held_out


def _apart(spec: DataSpec, format: str, formats: Sequence[str] | None, bad: BadRows) -> Any:
    """Read held-out examples that have sources of their own."""
    sources = spec.sources("eval")
    parts = _alike([_read(source, bad, formats) for source in sources])
    if {part.format for part in parts} != {format}:
        parts = [_as_messages(p) if format == "messages" else p for p in parts]
    if (found := parts[0].format) != format:
        raise UserError(f"data.eval: got {found} examples, but {format} to train on; write alike")
    return mixed([part.rows for part in parts], [SourceSpec(path=s.path) for s in sources], spec, 0)


def _joined(rows: list[Any]) -> Any:
    """Put rows one after another; None of none."""
    from datasets import concatenate_datasets

    if len(rows) < 2:
        return rows[0] if rows else None
    return concatenate_datasets(rows)


def _noted(sources: list[SourceSpec], parts: Sequence[Part | None]) -> tuple[dict[str, Any], ...]:
    """Return what run.json says of the sources."""
    probabilities: Sequence[float | None] = weights(sources) or [None] * len(sources)
    return tuple(
        {
            "path": source.path,
            "format": None if part is None else part.format,
            "rows": None if part is None else len(part.rows),
            "weight": weight,
        }
        for source, part, weight in zip(sources, parts, probabilities, strict=True)
    )


def _streamed(
    spec: DataSpec, seed: int, formats: Sequence[str] | None, bad: tuple[BadRows, BadRows]
) -> Examples:
    """Open streams; what is held out is read at once."""
    from datasets import Dataset

    sources = spec.sources("train")
    streams = [Stream(source, bad[0], formats) for source in sources]
    if len({stream.format for stream in streams}) > 1:
        listed = "; ".join(f"{stream.source.path}: {stream.format}" for stream in streams)
        raise UserError(f"data.train: sources of several formats ({listed}); write them alike")
    format, held_out = streams[0].format, None
    if spec.eval is not None:
        held_out = _apart(spec, format, formats, bad[1])
    elif spec.eval_examples is not None:
        each = -(-spec.eval_examples // len(streams))
        first = [row for stream in streams for row in islice(stream, each)]
        held_out = Dataset.from_list(first[: spec.eval_examples])
    elif all(source.path in EMBEDDED for source in sources):
        held_out = _joined([load_embedded(source.path)[1] for source in sources])
    for stream in streams:
        stream.held_out = set() if held_out is None else keys(held_out)
    parts = [stream.dataset(seed, spec.shuffle_buffer) for stream in streams]
    train = mixed(parts, sources, spec, seed)
    train = train if spec.train_examples is None else train.take(spec.train_examples)
    return Examples(train, held_out, format, _noted(sources, [None] * len(sources)), bad)
