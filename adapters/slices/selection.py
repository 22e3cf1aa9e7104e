"""Which units are trained: rankings by chance or by score, one for each group or pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sft.adapters.select import seeded
from sft.adapters.slices.budget import Quota
from sft.adapters.slices.units import Slot, UnitGroup

CALIBRATED = ("activation", "product", "gradient")
SELECTIONS = ("random", "weight", *CALIBRATED)

Scores = Mapping[str, Tensor]  # by group name: (input features of the group's consumer,)


@dataclass(frozen=True)
class Choice:
    """How units are ranked.

    Args:
        seed: of random rankings.
        largest: prefer large scores.
        scores: by group name the score of each input feature of its consumer, or None: random.
        excluded: by module the features that may not be chosen.
    """

    seed: int
    largest: bool = True
    scores: Scores | None = None
    excluded: Mapping[str, Tensor] = field(default_factory=dict)


def choose_units(
    groups: Sequence[UnitGroup], quotas: Iterable[Quota], choice: Choice
) -> dict[str, dict[str, Tensor]]:
    """Return the chosen units of each matrix.

    The units of a group, or of all groups in a pool, are ranked once, and each matrix takes the
    first of them that it may: the matrices of a coupled group train the same units as far as
    their budgets go.

    Args:
        groups: what there is to choose from.
        quotas: how much of it.
        choice: how.

    Returns:
        By module and role the (n,) int64 units of the slot, ascending; n may be 0 in a pool.

    Raises:
        ValueError: too few units are left of those not excluded.
    """
    owners = {slot: group for group in groups for slot in group.slots}
    picked: dict[str, dict[str, Tensor]] = {}
    for quota in quotas:
        for slot, units in _take(quota, owners, choice).items():
            picked.setdefault(slot.module, {})[slot.role] = units.sort().values
    return picked


def choose_features(
    groups: Sequence[UnitGroup], quotas: Iterable[Quota], choice: Choice
) -> dict[str, Tensor]:
    """Return by module the (s,) int64 ascending features of the units that `choose_units` takes."""
    picked, found = choose_units(groups, quotas, choice), dict[str, list[Tensor]]()
    for group in groups:
        for slot in group.slots:
            units = picked[slot.module][slot.role]
            found.setdefault(slot.module, []).append(slot.table[units].flatten())
    return {module: torch.cat(parts).sort().values for module, parts in found.items()}


def unit_scores(features: Tensor, table: Tensor) -> Tensor:
    """Return (units,) float32: the score of a head is the mean of its channels' scores."""
    return features.float()[table].mean(dim=1)


def rank(scores: Tensor, *, largest: bool) -> Tensor:
    """Return positions by score, the best first; ties go to the lower position."""
    return scores.argsort(descending=largest, stable=True)


def _take(quota: Quota, owners: Mapping[Slot, UnitGroup], choice: Choice) -> dict[Slot, Tensor]:
    """Hand the quota's count out along the ranking of its slots' groups."""
    groups = [owners[slot] for slot in quota.slots]
    ranking = _ranking(groups, choice)
    starts = torch.tensor([0, *(group.num_units for group in groups)]).cumsum(0)
    which = torch.searchsorted(starts, ranking, right=True) - 1
    merged = torch.stack([which, ranking - starts[which]])
    entries, available = [], 0
    for i, slot in enumerate(quota.slots):
        place = (merged[0] == i).nonzero().flatten()
        own = slot.own(merged[1, place])
        if len(own) < len(place):  # a unit of its own stands where it is first named
            named = torch.div(merged[1, place], slot.shared, rounding_mode="floor")
            place = place[torch.stack([(named == unit).nonzero()[0, 0] for unit in own])]
        free = _free(slot, own, choice)
        available += int(free.sum())
        entries.append(torch.stack([torch.full_like(own, i), own, place])[:, free])
    if available < quota.count:
        slot = quota.slots[0]
        raise ValueError(
            f"exclude: leaves {available} of {quota.num_units} units of {slot.module!r} "
            f"(role {slot.role!r}), {quota.count} are to be trained; lower the budget"
        )
    every = torch.cat(entries, dim=1)
    best = every[:, every[2].argsort(stable=True)[: quota.count]]
    return {slot: best[1, best[0] == i] for i, slot in enumerate(quota.slots)}


def _ranking(groups: Sequence[UnitGroup], choice: Choice) -> Tensor:
    """Rank the units of these groups, numbered one group after another."""
    if choice.scores is not None:
        scores = [unit_scores(choice.scores[group.name], group.table) for group in groups]
        return rank(torch.cat(scores), largest=choice.largest)
    total = sum(group.num_units for group in groups)
    name = groups[0].name if len(groups) == 1 else f"pool of {groups[0].kind}"
    return torch.randperm(total, generator=seeded(choice.seed, "units", name))


def _free(slot: Slot, own: Tensor, choice: Choice) -> Tensor:
    """Tell of each unit whether none of its features is excluded."""
    taken = choice.excluded.get(slot.module)
    if taken is None:
        return torch.ones(len(own), dtype=torch.bool)
    return ~torch.isin(slot.table[own], taken.long()).any(dim=1)


def weight_scores(groups: Iterable[UnitGroup], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return ||D[:, j]||_2 of each input feature j of each group's consumer D.

    Args:
        groups: what is scored.
        read: returns the (out, in) weight of a module.
    """
    return {group.name: column_norms(read(group.consumer)) for group in groups}


def column_norms(weight: Tensor) -> Tensor:
    """Return (in,) float32, the norm of each column of an (out, in) weight."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
    return norms.cpu()
