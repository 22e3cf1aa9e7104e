"""What a run says of its data: counts, sources, rows left out, lengths, an example."""

from __future__ import annotations

from typing import Any

from sft.data.load import Examples

SHOWN = 5  # malformed rows that are printed; run.json lists more


def describe(data: Examples) -> str:
    """Say how many examples there are."""
    held_out = 0 if data.held_out is None else len(data.held_out)
    count = "streamed examples" if data.streamed else f"{len(data.train):,} examples"
    found = f"{count} to train on, {held_out:,} held out"
    if data.dropped:
        found += f"; {data.dropped:,} dropped that are equal to a held-out one"
    return found


def skipped(data: Examples) -> list[str]:
    """Say which rows were left out, in a few lines."""
    count = sum(bad.count for bad in data.bad)
    rows = [row for bad in data.bad for row in bad.rows]
    found = [f"{count:,} malformed rows left out"] if count else []
    found += [f"  {row.file}:{row.line}: {row.reason}" for row in rows[:SHOWN]]
    return [*found, "  ..."] if count > SHOWN else found


def section(data: Examples, trainer: Any, preview: dict[str, Any]) -> dict[str, Any]:
    """Return the section `data` of run.json.

    Args:
        data: of the run.
        trainer: whose train_dataset is tokenised.
        preview: of `sft.data.preview.preview`.
    """
    return {
        "format": data.format,
        "train": None if data.streamed else len(data.train),
        "held_out": 0 if data.held_out is None else len(data.held_out),
        "dropped": data.dropped,
        "sources": list(data.sources),
        "skipped_rows": sum(bad.count for bad in data.bad),
        "skipped": [row for bad in data.bad for row in bad.listed()],
        "tokens": token_lengths(trainer.train_dataset),
        "preview": preview,
    }


def token_lengths(rows: Any) -> dict[str, float] | None:
    """Return how long rows are in tokens, or None where that is not known beforehand.

    Args:
        rows: a data set that a trainer has tokenised; of pairs, prompt and chosen reply count.
    """
    import numpy
    from datasets import Dataset

    if not isinstance(rows, Dataset) or len(rows) == 0:
        return None
    there = set(rows.column_names)
    columns = {"input_ids"} & there or {"prompt_ids", "chosen_ids"} & there
    if not columns:
        return None
    lengths = sum(_lengths(rows, name) for name in columns)
    p50, p95 = numpy.percentile(lengths, [50, 95])
    return {
        "mean": round(float(numpy.mean(lengths)), 1),
        "p50": float(p50),
        "p95": float(p95),
        "max": int(numpy.max(lengths)),
    }


def _lengths(rows: Any, column: str) -> Any:
    """Return the lengths of the lists in a column."""
    import numpy

    batches = rows.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    return numpy.concatenate(
        [numpy.asarray(batch[column].combine_chunks().value_lengths()) for batch in batches]
    )
