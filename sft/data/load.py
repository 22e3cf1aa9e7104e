"""Training and held-out examples of a recipe: read, recognised, split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.data.cmudict import EMBEDDED, load_embedded
from sft.data.files import read_file
from sft.errors import UserError
from sft.recipe.schema import DataSpec

FORMATS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}


@dataclass(frozen=True)
class Examples:
    """What a run trains on and is measured on; `held_out` may be None."""

    train: Any
    held_out: Any | None
    format: str


def load_data(spec: DataSpec, seed: int) -> Examples:
    """Load the examples of a recipe; the held-out ones are never trained on.

    Args:
        spec: The `data:` section.
        seed: Decides which examples are held out.

    Raises:
        UserError: When a file is missing, malformed, empty, or has no columns that we know.
    """
    if spec.train in EMBEDDED:
        train, held_out = _embedded(spec)
    else:
        train, held_out = _local(spec, seed)
    if spec.train_examples is not None:
        train = train.select(range(min(spec.train_examples, len(train))))
    format = _columns_of(train, spec.train, spec.format)
    return Examples(train, held_out, format)


def detect_format(columns: list[str], name: str, wanted: str = "auto") -> str:
    """Return the format that a file's columns spell, or raise UserError."""
    fits = [format for format, needed in FORMATS.items() if set(needed) <= set(columns)]
    allowed = "; ".join(f"{format}: {' + '.join(needed)}" for format, needed in FORMATS.items())
    found = f"{name}: found the columns {', '.join(columns) or '(none)'}"
    if wanted != "auto":
        if wanted not in fits:
            needed = " + ".join(FORMATS[wanted])
            raise UserError(f"data.format: {found}; {wanted} needs {needed}")
        return wanted
    if not fits:
        raise UserError(f"data.format: {found}; expected one of: {allowed}")
    if len(fits) > 1:
        raise UserError(f"data.format: {found}, which fit {' and '.join(fits)}; set data.format")
    return fits[0]


def _local(spec: DataSpec, seed: int) -> tuple[Any, Any | None]:
    """Read files; hold out a file, a fraction, a number of examples, or nothing."""
    train = _only_known_columns(read_file("data.train", spec.train), spec.train, spec.format)
    if spec.eval is not None:
        held_out = read_file("data.eval", spec.eval)
        return train, _only_known_columns(held_out, spec.eval, spec.format)
    size: float | int | None = spec.eval_fraction or spec.eval_examples
    if size is None:
        return train, None
    count = round(size * len(train)) if isinstance(size, float) else size
    if not 0 < count < len(train):
        key = "eval_fraction" if spec.eval_fraction else "eval_examples"
        raise UserError(f"data.{key}: got {size}, but {spec.train} has {len(train)} examples")
    parts = train.train_test_split(test_size=count, seed=seed)
    return _without(parts["train"], parts["test"], spec), parts["test"]


def _embedded(spec: DataSpec) -> tuple[Any, Any]:
    """Read the embedded words; which of them are held out is fixed in the file."""
    for key in ("eval", "eval_fraction"):
        if getattr(spec, key) is not None:
            raise UserError(
                f"data.{key}: {spec.train!r} brings its own held-out words; remove the key"
            )
    train, held_out = load_embedded(spec.train)
    if spec.eval_examples is not None:
        held_out = held_out.select(range(min(spec.eval_examples, len(held_out))))
    return train, held_out


def _without(train: Any, held_out: Any, spec: DataSpec) -> Any:
    """Drop the training examples that are equal to a held-out one."""
    seen = {repr(sorted(row.items())) for row in held_out}
    keep = [i for i, row in enumerate(train) if repr(sorted(row.items())) not in seen]
    if not keep:
        raise UserError(f"data.train: {spec.train}: every example is also held out; remove copies")
    return train.select(keep) if len(keep) < len(train) else train


def _only_known_columns(dataset: Any, name: str, wanted: str) -> Any:
    """Check a data set's columns and values; drop what the format does not use."""
    format = _columns_of(dataset, name, wanted)
    for column in FORMATS[format]:
        _check_values(dataset, name, column)
    return dataset.select_columns(list(FORMATS[format]))


def _columns_of(dataset: Any, name: str, wanted: str) -> str:
    return detect_format(list(dataset.column_names), name, wanted)


def _check_values(dataset: Any, name: str, column: str) -> None:
    """Refuse a column with holes, or of the wrong type."""
    holes = dataset.data.column(column).is_null()
    if holes.true_count if hasattr(holes, "true_count") else sum(holes.to_pylist()):
        row = holes.to_pylist().index(True) + 1
        raise UserError(f"data.train: {name}: example {row} has no {column!r}")
    feature = dataset.features[column]
    kind = str(getattr(feature, "dtype", "list"))
    expected = "list" if column == "messages" else "string"
    if expected not in kind.lower():
        raise UserError(f"data.train: {name}: {column!r} holds {kind}; expected {expected}s")
