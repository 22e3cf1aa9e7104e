"""Classes of examples: which there are, what they are called, and a model's head for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sft.data.origin import Origin
from sft.errors import UserError
from sft.models import load_config
from sft.recipe.schema import ModelSpec


def label_names(rows: Any, column: str, given: Sequence[str] | None) -> list[str] | None:
    """Return the names of the classes in order of their numbers, or None where values are real.

    Args:
        rows: a data set.
        column: of labels: names, numbers, or lists of them.
        given: what the recipe calls the classes; by default the data set's own names, or the
            labels as they are, sorted.

    Raises:
        UserError: a label is none of the given names, nor the number of one; or rows are streamed,
            and nobody names the classes.
    """
    if not hasattr(rows, "__len__"):
        return _streamed(given)
    if given is None and (own := _feature_names(rows.features[column])) is not None:
        return own
    found = set(_flat(rows[column]))
    if any(isinstance(label, float) for label in found):
        return None
    names: list[Any] = sorted(found, key=_natural) if given is None else list(given)
    if all(isinstance(label, int) for label in names):  # 0, 1, 2: the gaps count too
        names = list(range(max(names) + 1)) if min(names) >= 0 else names
    if len(names) < 2:
        raise UserError(
            f"data.train: {column}: got one class alone ({', '.join(map(str, names))}), so there "
            "is nothing to learn; add examples of another, or name all by task.labels"
        )
    shown = [str(name) for name in names]
    for label in sorted(found, key=_natural):
        class_number(label, shown)
    return shown


def class_number(label: Any, names: Sequence[str]) -> int:
    """Return the number of a class by its name, or by its number.

    Raises:
        UserError: there is no such class.
    """
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, int) and 0 <= label < len(names):
        return int(label)  # true and false are numbers too
    raise UserError(
        f"task.labels: got the label {label!r} in the data, allowed is {', '.join(names)}; name "
        "it, or mend the data"
    )


def check_labels(
    rows: Any, column: str, names: Sequence[str], at: Origin | None, format: str
) -> None:
    """Check that every label is that of a class.

    Args:
        rows: a data set.
        column: of labels.
        names: of the classes.
        at: where the rows were read.
        format: of the rows.

    Raises:
        UserError: one is not; names its file and line.
    """
    for label in sorted(set(_flat(rows[column])), key=_natural):
        try:
            class_number(label, names)
        except UserError:
            place = f"{at.place(format, column, label)}: " if at is not None else ""
            raise UserError(
                f"{place}{column}: got {label!r}, allowed is {', '.join(names)}, the classes of "
                "training; mend the row, or name the classes by task.labels"
            ) from None


def with_labels(spec: ModelSpec, names: Sequence[str] | None, problem: str) -> Any:
    """Return the model's configuration with a head for these classes; one output for None.

    Args:
        spec: the `model:` section.
        names: of the classes.
        problem: transformers' `problem_type`, which tells the loss.
    """
    config = load_config(spec)
    chosen = list(names) if names is not None else ["value"]
    config.num_labels = len(chosen)
    config.id2label = dict(enumerate(chosen))
    config.label2id = {name: number for number, name in enumerate(chosen)}
    config.problem_type = problem
    return config


def _streamed(given: Sequence[str] | None) -> list[str]:
    if given is None:
        raise UserError(
            "task.labels: is missing, and a streamed data set is not read through to find the "
            "classes; name them"
        )
    return list(given)


def _feature_names(feature: Any) -> list[str] | None:
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if hasattr(inner, "names") else None


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def _natural(label: Any) -> tuple[bool, Any]:
    """Sort numbers by size and before names."""
    return (False, label) if isinstance(label, int | float) else (True, str(label))
