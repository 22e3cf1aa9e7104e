"""Read a file of examples through `datasets`, with errors that name the file and the line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.data.by_hand import LINES, delimiter, header, wrong_names
from sft.errors import UserError, one_line

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def read_file(name: str, key: str) -> Any | None:
    """Read a file into a datasets.Dataset.

    Args:
        name: Path of the file; its ending names the format.
        key: The recipe key that names the file; messages start with it.

    Returns:
        the rows, or None where they have to be read line by line: one of them is malformed.

    Raises:
        UserError: the file is missing or empty, or nothing can be read from it.
    """
    path = Path(name).expanduser()
    check_file(key, path, name)
    try:
        with quiet():
            found = _read(path)
            found.data.validate(full=True)  # readers of JSON and Parquet take bytes on trust
    except Exception as error:
        if path.suffix in LINES:
            return None
        raise UserError(f"{key}: {name}: cannot be read ({cause(error)})") from error
    if path.suffix == ".txt":
        found = found.filter(lambda row: bool(row["text"].strip()))
    if len(found) == 0:
        raise UserError(f"{key}: {name}: the file holds no examples")
    return found


def check_file(key: str, path: Path, name: str) -> None:
    """Raise UserError unless a file is there, holds something, and has an ending that we know."""
    if not path.is_file():
        raise UserError(f"{key}: {name}: no such file")
    if path.suffix not in BUILDERS:
        raise UserError(
            f"{key}: got {name!r}; expected a file ending in {', '.join(BUILDERS)}, or 'cmudict'"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{key}: {name}: the file is empty")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let `datasets` show no progress in the block, and log no error that it raises as well."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def cause(error: BaseException) -> str:
    """Return the message of the innermost error; the outer ones only say that reading failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)[:200]


def _read(path: Path) -> Any:
    import datasets

    builder = BUILDERS[path.suffix]
    given: dict[str, Any] = {}
    if builder == "csv":  # text is text: a word may look like a number, or be "null"
        names = header(path)
        if (wrong := wrong_names(names)) is not None:
            raise ValueError(wrong)
        features = {name: datasets.Value("string") for name in names}
        given = {
            "features": datasets.Features(features),
            "sep": delimiter(path),
            "keep_default_na": False,
            "na_values": [""],
        }
    found = datasets.load_dataset(builder, data_files=str(path), split="train", **given)
    for name in {"label", "answer"} & set(found.column_names) if builder == "csv" else ():
        found = _numbered(found, name)
    return found


def _numbered(found: Any, name: str) -> Any:
    """Read a column as numbers where all of it are."""
    from datasets import Value

    for kind, type_ in ((int, "int64"), (float, "float64")):
        try:
            for value in found[name]:
                if value is not None:
                    kind(value)
        except ValueError:
            continue
        with quiet():
            return found.cast_column(name, Value(type_))
    return found
