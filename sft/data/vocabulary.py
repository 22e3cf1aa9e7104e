"""Token ids that come as data must be ids of the model."""

from __future__ import annotations

from typing import Any

from sft.data.load import Examples
from sft.errors import UserError


def check_ids(data: Examples, model: Any) -> None:
    """Raise UserError on tokenised examples with an id that the model has no embedding of.

    Those that are streamed are not known yet.

    Args:
        data: of a run.
        model: its own.
    """
    if data.format != "tokenised":
        return
    size = model.get_input_embeddings().weight.shape[0]
    for key, rows in (("train", data.train), ("eval", data.held_out)):
        if rows is None or (key == "train" and data.streamed):
            continue
        for column in ("input_ids", "labels"):
            largest = _largest(rows, column)
            if largest is not None and largest >= size:
                raise UserError(
                    f"data.{key}: {column}: got {largest}, allowed is 0 to {size - 1}, the ids "
                    "of the model; tokenise with the model's own tokenizer"
                )


def _largest(rows: Any, column: str) -> int | None:
    """Return the largest number in a column of lists, without a list of Python's."""
    if column not in rows.column_names:
        return None
    batches = rows.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    found = [chunk.flatten() for batch in batches for chunk in batch[column].chunks]
    return max((int(ids.to_numpy().max()) for ids in found if len(ids)), default=None)
