"""Sources put together: how much of each, in which order, what is held out of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sft.data.spec import DataSpec, SourceSpec
from sft.errors import UserError


@dataclass(frozen=True)
class Part:
    """The examples of one source.

    Args:
        source: where they are from.
        rows: as tasks take them.
        format: of the rows.
        held_out: what the source itself holds out, or what was taken from `rows`.
    """

    source: SourceSpec
    rows: Any
    format: str
    held_out: Any | None = None


def limited(part: Part, seed: int, index: int) -> Part:
    """Keep the share of a source that it asks for: rows drawn by seed, in their order."""
    total, source = len(part.rows), part.source
    if source.fraction is None and source.examples is None:
        return part
    count = source.examples if source.fraction is None else round(source.fraction * total)
    assert count is not None
    if count < 1:
        raise UserError(
            f"data.train.{index}.fraction: got {source.fraction}, which is none of the {total} "
            f"examples of {source.path}; set more"
        )
    if count >= total:
        return part
    kept = sorted(random.Random(f"{seed}/{index}").sample(range(total), count))
    return replace(part, rows=part.rows.select(kept))


def held_out_of(parts: Sequence[Part], spec: DataSpec, seed: int) -> list[Part]:
    """Hold a fraction or a number of examples out; of several sources, from each its share."""
    sizes = [len(part.rows) for part in parts]
    total, wanted = sum(sizes), spec.eval_fraction or spec.eval_examples
    if wanted is None:
        return list(parts)
    count = round(wanted * total) if isinstance(wanted, float) else wanted
    if not 0 < count < total:
        key = "eval_fraction" if spec.eval_fraction else "eval_examples"
        names = ", ".join(part.source.path for part in parts)
        raise UserError(f"data.{key}: got {wanted}, but {names} has {total} examples")
    shares = apportion(count, [w * s for w, s in zip(_scales(parts), sizes, strict=True)])
    found = []
    for part, share, size in zip(parts, shares, sizes, strict=True):
        share = min(share, size - 1)
        if share < 1:
            found.append(part)
            continue
        halves = part.rows.train_test_split(test_size=share, seed=seed)
        found.append(replace(part, rows=halves["train"], held_out=halves["test"]))
    return found


def apportion(total: int, sizes: Sequence[float]) -> list[int]:
    """Share a whole number out in proportion, by largest remainder."""
    exact = [total * size / sum(sizes) for size in sizes]
    found = [int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda i: (found[i] - exact[i], i))
    for i in order[: total - sum(found)]:
        found[i] += 1
    return found


def weights(sources: Sequence[SourceSpec]) -> list[float] | None:
    """Return the probabilities by which sources are drawn from, or None where none has a weight."""
    if all(source.weight is None for source in sources):
        return None
    given = [1.0 if source.weight is None else source.weight for source in sources]
    return [weight / sum(given) for weight in given]


def mixed(parts: Sequence[Any], sources: Sequence[SourceSpec], spec: DataSpec, seed: int) -> Any:
    """Put rows of several sources together: drawn by weight, or one source after another.

    Args:
        parts: data sets, eager or streamed.
        sources: of each.
        spec: says when drawing ends.
        seed: of the draws.
    """
    from datasets import concatenate_datasets, interleave_datasets

    probabilities = weights(sources)
    if len(parts) == 1:
        return parts[0]
    try:
        if probabilities is None:
            return concatenate_datasets(list(parts))
        return interleave_datasets(
            list(parts), probabilities=probabilities, seed=seed, stopping_strategy=spec.mixing
        )
    except (ValueError, TypeError) as error:
        columns = "; ".join(
            f"{source.path}: {_columns(part)}" for source, part in zip(sources, parts, strict=True)
        )
        raise UserError(
            f"data.train: the sources hold other types of values ({columns}); write them alike"
        ) from error


def _columns(rows: Any) -> str:
    return ", ".join(f"{name} {kind!r}"[:60] for name, kind in (rows.features or {}).items())


def _scales(parts: Sequence[Part]) -> list[float]:
    """Return what a row of each part counts: as much as is drawn of its source."""
    probabilities = weights([part.source for part in parts])
    if probabilities is None:
        return [1.0] * len(parts)
    return [p / len(part.rows) for p, part in zip(probabilities, parts, strict=True)]
