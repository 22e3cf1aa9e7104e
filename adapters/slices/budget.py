"""How many units of each matrix are trained: exact arithmetic over the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sft.adapters.budget import Budget
from sft.adapters.slices.units import Slot

ALLOCATIONS = ("uniform", "pooled")
Ratio = float | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Quota:
    """So many units are chosen from these slots together: one matrix, or a pool over layers."""

    slots: tuple[Slot, ...]
    count: int

    @property
    def num_units(self) -> int:
        """Units to choose from."""
        return sum(slot.num_units for slot in self.slots)


def by_ratio(slots: Sequence[Slot], ratio: Ratio, allocation: str) -> list[Quota]:
    """Return the quotas that train a share of the units.

    uniform: min(N, max(1, floor(ratio * N + 1/2))) of the N units of each matrix. pooled: as
    S2FT's authors (arXiv 2412.06289) do, int(ratio * N) of the N units of all layers.

    Args:
        slots: what is trained.
        ratio: share of the units, or one for each role.
        allocation: one of `ALLOCATIONS`.

    Raises:
        ValueError: a pool would get no unit.
    """
    quotas = []
    for pool in _pools(slots, allocation):
        share = ratio if isinstance(ratio, (int, float)) else ratio[pool[0].role]
        total = sum(slot.num_units for slot in pool)
        if allocation == "pooled":
            count = int(total * share)
        else:
            count = min(total, max(1, math.floor(share * total + 0.5)))
        if count == 0:
            raise ValueError(
                f"ratio: {share} of {total} units of role {pool[0].role!r} is none; raise it"
            )
        quotas.append(Quota(tuple(pool), count))
    return quotas


def by_weights(slots: Sequence[Slot], budget: Budget, allocation: str) -> list[Quota]:
    """Return the quotas that train a number of weights, or less than one unit below it.

    Each role gets the same number of weights, as S2FT's authors share theirs between o and down
    (what a role cannot hold goes to the others), and in a role each matrix in proportion to its
    size; units are then rounded by largest remainder.

    Args:
        slots: what is trained.
        budget: how many of their weights.
        allocation: one of `ALLOCATIONS`.

    Raises:
        ValueError: a matrix or pool would get no unit.
    """
    names = {f"{slot.module} ({slot.role})": slot for slot in slots}
    total = budget.total({name: slot.shape for name, slot in names.items()})
    roles = _share_roles(total, slots)
    pools = _pools(slots, allocation)
    exact = [_exact_units(pool, slots, roles) for pool in pools]
    counts = [math.floor(units) for units in exact]
    left = total - sum(n * pool[0].unit_weights for n, pool in zip(counts, pools, strict=True))
    by_remainder = sorted(range(len(pools)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder:
        if pools[i][0].unit_weights <= left and counts[i] < exact[i]:
            counts[i] += 1
            left -= pools[i][0].unit_weights
    for pool, count in zip(pools, counts, strict=True):
        if count == 0:
            raise ValueError(
                f"{budget}: {total:,} weights leave no unit for {pool[0].module!r}, one of which "
                f"has {pool[0].unit_weights:,}; raise the budget or train fewer roles"
            )
    return [Quota(tuple(pool), n) for pool, n in zip(pools, counts, strict=True)]


def _pools(slots: Sequence[Slot], allocation: str) -> list[list[Slot]]:
    """Each slot alone, or those of one role whose units are equally large together."""
    if allocation == "uniform":
        return [[slot] for slot in slots]
    pools: dict[tuple[str, int], list[Slot]] = {}
    for slot in slots:
        pools.setdefault((slot.role, slot.unit_weights), []).append(slot)
    return list(pools.values())


def _weights(slots: Sequence[Slot]) -> int:
    return sum(slot.num_units * slot.unit_weights for slot in slots)


def _exact_units(
    pool: Sequence[Slot], slots: Sequence[Slot], roles: Mapping[str, Fraction]
) -> Fraction:
    role = pool[0].role
    whole = _weights([slot for slot in slots if slot.role == role])
    return roles[role] * _weights(pool) / whole / pool[0].unit_weights


def _share_roles(total: int, slots: Sequence[Slot]) -> dict[str, Fraction]:
    """Weights for each role: equal parts, but no more than the role has."""
    sizes = {role: _weights([s for s in slots if s.role == role]) for role in _roles(slots)}
    shares: dict[str, Fraction] = {}
    for role in sorted(sizes, key=lambda name: sizes[name]):
        left = total - sum(shares.values())
        shares[role] = min(Fraction(sizes[role]), Fraction(left, len(sizes) - len(shares)))
    return shares


def _roles(slots: Sequence[Slot]) -> list[str]:
    return list(dict.fromkeys(slot.role for slot in slots))
