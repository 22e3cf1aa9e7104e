"""Ways to make one change of several: sums, means, TIES, DARE, pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sft.errors import UserError, unknown_name
from sft.tools.aligned import Aligned

Rule = Callable[[Aligned, "Request", torch.Generator], Aligned]


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        operation: a name of `OPERATIONS`.
        weights: of each change.
        density: share of each change's positions that is kept, by operations that drop some.
        seed: of what is dropped at random.
    """

    operation: str
    weights: tuple[float, ...]
    density: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Operation:
    """A way to combine.

    Args:
        summary: one line.
        rule: drops, scales and combines.
        least: number of changes it needs.
        most: number of changes it takes; None for any.
        drops: whether it takes a density.
    """

    summary: str
    rule: Rule
    least: int = 2
    most: int | None = None
    drops: bool = False


def combine(
    aligned: Aligned, request: Request, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Combine changes of one weight.

    Args:
        aligned: the changes, not weighted.
        request: what is asked for.
        generator: of what is dropped at random.

    Returns:
        values (u,), and where (u,) the result reaches: no other value is to be kept.
    """
    found = OPERATIONS[request.operation].rule(aligned, request, generator)
    return found.values[0], found.present[0]


def check_request(request: Request, count: int) -> None:
    """Raise UserError unless an operation can do what is asked of it with so many changes."""
    name, known = request.operation, OPERATIONS.get(request.operation)
    if known is None:
        text = unknown_name(name, OPERATIONS, kind="operation")
        raise UserError(f"operation: got {name!r}: {text}")
    if count < known.least or (known.most is not None and count > known.most):
        allowed = f"{known.least}" if known.most == known.least else f"at least {known.least}"
        raise UserError(f"{name}: got {count} adapters, allowed is {allowed}")
    if len(request.weights) != count:
        raise UserError(
            f"--weights: got {len(request.weights)} for {count} adapters; give one for each"
        )
    if not all(map(math.isfinite, request.weights)):
        raise UserError(f"--weights: got {request.weights}; give finite numbers")
    density = request.density
    if known.drops and density is None:
        raise UserError(f"--density: {name} needs the share of positions to keep; give 0.2, say")
    if not known.drops and density is not None:
        raise UserError(f"--density: {name} drops nothing; leave it out")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density: got {density:g}, allowed is 0 < density <= 1")


def _sum(aligned: Aligned, request: Request, _: torch.Generator) -> Aligned:
    """sum_i w_i d_i, wherever any reaches."""
    return _one(aligned, _weighted(aligned, request).values.sum(0), aligned.present.any(0))


def _difference(aligned: Aligned, request: Request, generator: torch.Generator) -> Aligned:
    """w_1 d_1 - sum of the other w_i d_i."""
    first, *others = request.weights
    signed = (first, *(-weight for weight in others))
    return _sum(aligned, Request(request.operation, signed), generator)


def _mean(aligned: Aligned, request: Request, _: torch.Generator) -> Aligned:
    """The mean of the w_i d_i that reach a position, wherever any does."""
    held = _weighted(aligned, request)
    mean = held.values.sum(0) / held.present.sum(0).clamp(min=1)
    return _one(aligned, mean, held.present.any(0))


def _common(aligned: Aligned, request: Request, generator: torch.Generator) -> Aligned:
    """The mean of the w_i d_i, where all reach."""
    return _mean(aligned.kept(aligned.present.all(0)), request, generator)


def _ties(aligned: Aligned, request: Request, _: torch.Generator) -> Aligned:
    """Trim each to its largest, elect a sign for each position, average who agrees with it."""
    return _elected(_weighted(_trimmed(aligned, request), request))


def _dare(aligned: Aligned, request: Request, generator: torch.Generator) -> Aligned:
    """Drop at random, rescale what stays by 1 / density, and add."""
    return _sum(_thinned(aligned, request, generator), request, generator)


def _dare_ties(aligned: Aligned, request: Request, generator: torch.Generator) -> Aligned:
    """Drop at random and rescale as DARE does, then combine as TIES does."""
    return _elected(_weighted(_thinned(aligned, request, generator), request))


def _pruned(aligned: Aligned, request: Request, generator: torch.Generator) -> Aligned:
    """Keep the largest."""
    return _sum(_trimmed(aligned, request), request, generator)


def _elected(aligned: Aligned) -> Aligned:
    """Average, at each position, the values whose sign is that of their sum.

    Paper: Yadav et al., TIES-Merging (arXiv 2306.01708). Signs are elected after weighting, so that
    a negative weight votes for the other side.
    """
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    agreeing = calculate_majority_sign_mask(aligned.values) & aligned.present
    return _one(aligned, disjoint_merge(aligned.values, agreeing), agreeing.any(0))


def _trimmed(aligned: Aligned, request: Request) -> Aligned:
    """Keep of each change the `density` of its positions with the largest values."""
    where = torch.zeros_like(aligned.present)
    for row, (values, present) in enumerate(zip(aligned.values, aligned.present, strict=True)):
        size = values.abs().masked_fill(~present, -1)
        where[row, size.topk(_kept(int(present.sum()), request)).indices] = True
    return aligned.kept(where)


def _thinned(aligned: Aligned, request: Request, generator: torch.Generator) -> Aligned:
    """Keep each value with the probability `density`, and divide it by that.

    Paper: Yu et al., Language Models are Super Mario (arXiv 2311.03099).
    """
    assert request.density is not None
    drawn = torch.rand(aligned.values.shape, generator=generator)
    thinned = aligned.kept(drawn < request.density)
    weight = torch.full((len(aligned.values),), 1 / request.density)
    return thinned.weighted(weight)


def _kept(count: int, request: Request) -> int:
    """Return how many of `count` positions stay: at least one, where there is one."""
    assert request.density is not None
    return min(count, max(1, round(count * request.density)))


def _weighted(aligned: Aligned, request: Request) -> Aligned:
    return aligned.weighted(torch.tensor(request.weights, dtype=aligned.values.dtype))


def _one(aligned: Aligned, values: Tensor, present: Tensor) -> Aligned:
    return Aligned(aligned.shape, aligned.positions, values.unsqueeze(0), present.unsqueeze(0))


OPERATIONS: dict[str, Operation] = {
    "add": Operation("the weighted sum, wherever any reaches", _sum),
    "subtract": Operation("the first minus the others", _difference),
    "scale": Operation("one, times its weight", _sum, least=1, most=1),
    "union": Operation("the mean of those that reach a position", _mean),
    "intersect": Operation("the mean, where all of them reach", _common),
    "prune": Operation("one, its largest values alone", _pruned, least=1, most=1, drops=True),
    "ties": Operation("trim, elect signs, average who agrees", _ties, drops=True),
    "dare": Operation("drop at random, rescale, add", _dare, least=1, drops=True),
    "dare-ties": Operation("drop at random, rescale, then TIES", _dare_ties, drops=True),
}
