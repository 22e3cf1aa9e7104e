"""Which rows are equal: what is held out is never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from sft.errors import UserError


def without(train: Any, held_out: Any | None, name: str) -> tuple[Any, int]:
    """Drop the training rows that are equal to a held-out one.

    Args:
        train: a data set.
        held_out: another, or None.
        name: of the training data, for the message.

    Returns:
        what is left, and how many were dropped.

    Raises:
        UserError: nothing is left.
    """
    if held_out is None:
        return train, 0
    seen = keys(held_out)
    keep = [i for i, row in enumerate(undecoded(train)) if key_of(row) not in seen]
    if not keep:
        raise UserError(f"data.train: {name}: every example is also held out; remove copies")
    dropped = len(train) - len(keep)
    return (train.select(keep) if dropped else train), dropped


def keys(rows: Any) -> set[bytes]:
    """Return the keys of all rows."""
    return {key_of(row) for row in undecoded(rows)}


def key_of(row: dict[str, Any]) -> bytes:
    """Return what only equal rows share."""
    return hashlib.blake2b(repr(_there(row)).encode("utf-8", "replace"), digest_size=16).digest()


def _there(value: Any) -> Any:
    """Return a value without what is missing in it: a table fills that up with None."""
    if isinstance(value, dict):
        return sorted((key, _there(item)) for key, item in value.items() if item is not None)
    return [_there(item) for item in value] if isinstance(value, list) else value


def undecoded(rows: Any) -> Iterable[dict[str, Any]]:
    """Return the rows with images left as the bytes or files that they are."""
    from datasets import Image

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    found: Iterable[dict[str, Any]] = rows
    return found
