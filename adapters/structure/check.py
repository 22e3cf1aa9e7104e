"""Prove on a small random model that permuting its units leaves its output as it was."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sft.adapters.structure.groups import CoupledGroup, GroupKind
from sft.adapters.structure.layout import unwrapped
from sft.adapters.structure.match import bare, find_groups
from sft.adapters.structure.probe import output, quiet, small_model
from sft.adapters.structure.reorder import reorder_

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What a check of a small model showed.

    Args:
        broken: kinds of group whose units can't be permuted safely, each with the reason.
        ran: names of the groups that the small model's forward went through, layer numbers
            replaced; None if it could not run.
    """

    broken: dict[GroupKind, str] = field(default_factory=dict)
    ran: frozenset[str] | None = None

    def against(self, group: CoupledGroup) -> str:
        """Return why this group shouldn't be permuted, or ""."""
        if group.kind in self.broken:
            return self.broken[group.kind]
        if self.ran is not None and _anonymous(group.name) not in self.ran:
            return "a small random model of this class does not run this part on its own"
        return ""


def self_check(model: nn.Module, seed: int = 0) -> str | None:
    """Return why the map of a model can't be trusted to permute its units, or None if it can.

    Builds a small fp32 model of the same class, gives every parameter random values, permutes all
    permutable groups at random within what their coupling allows, and compares the output in eval
    mode: it must stay within 1e-4. What text alone doesn't reach (an image tower whose images
    enter among the tokens) isn't checked. The random state of the caller isn't touched.

    Args:
        model: a transformers model; its weights aren't read, so it may be on the meta device.
        seed: of the small model's weights, its input and the permutations.
    """
    return next(iter(verdict(model, seed).broken.values()), None)


def verdict(model: nn.Module, seed: int = 0) -> Verdict:
    """Return what `self_check` finds, kind by kind."""
    base = bare(model)
    groups = [group for group in find_groups(base).groups if group.permutable]
    kinds: list[GroupKind] = list(dict.fromkeys(group.kind for group in groups))
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            small = small_model(base)
            before = output(small, seed)
        except Exception as error:  # whatever a model's own code raises is the reason
            line = str(error).strip().splitlines()
            reason = f"no small model of this class to check it on: {line[0] if line else error!r}"
            return Verdict(dict.fromkeys(kinds, reason))
        groups = find_groups(small).groups
        broken = {
            kind: f"permuting {kind} of a small random model changes its output by {change:.1e}"
            for kind in kinds
            if not (change := change_by(small, groups, kind, before, seed)) <= TOLERANCE
        }
        return Verdict(broken, groups_run(small, groups, seed))


def groups_run(small: nn.Module, groups: list[CoupledGroup], seed: int) -> frozenset[str]:
    """Return the names, layer numbers replaced, of the groups whose consumer runs in a forward."""
    ran: set[str] = set()
    handles = []
    for group in groups:
        module = unwrapped(small.get_submodule(group.consumers[0].module))
        name = _anonymous(group.name)
        handles.append(module.register_forward_hook(lambda *_, name=name: ran.add(name)))
    try:
        output(small, seed)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(ran)


def change_by(
    small: nn.Module, groups: list[CoupledGroup], kind: GroupKind, before: Tensor, seed: int
) -> float:
    """Return how far random legal orders of one kind of group move the output."""
    permuted = copy.deepcopy(small)
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        if group.kind == kind and group.permutable:
            reorder_(permuted, group, random_order(group, generator))
    return float((output(permuted, seed) - before).abs().max())


def random_order(group: CoupledGroup, generator: torch.Generator) -> Tensor:
    """Return a random order that the coupling allows."""
    count = group.num_units // group.block_size
    inside = torch.rand(count, group.block_size, generator=generator).argsort(dim=1)
    order = inside + torch.arange(count)[:, None] * group.block_size
    if group.blocks_move:
        order = order[torch.randperm(count, generator=generator)]
    return order.flatten()


def _anonymous(name: str) -> str:
    """Replace the numbers in a path: layers of one kind share what was shown of one."""
    return re.sub(r"\d+", "*", name)
