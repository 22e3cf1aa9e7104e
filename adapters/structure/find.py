"""Find the coupled groups of a model: by its family's names, else by their look."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from sft.adapters.structure.check import verdict
from sft.adapters.structure.groups import CoupledGroup
from sft.adapters.structure.match import bare, find_groups


def coupled_groups(model: nn.Module) -> list[CoupledGroup]:
    """Return the coupled groups of a model, in the order of its modules.

    Call it on the base model, before adapters are injected: names are paths in the model given.
    (Around an injected adapter it looks through `base_layer`, and into a PeftModel at its base
    model, so the names stay the same; only `permute_` insists on a bare model.) No weight is
    read: a model on the meta device will do.

    A model of an unknown family is searched for modules that look like attention or a
    feed-forward. What is found there is permutable only if a small random model of the same class
    keeps its output under random permutations; selecting units by index is always safe.

    Raises:
        ValueError: an unknown family in which nothing like attention or a feed-forward is found,
            one that is refused, or matrices that several layers share.
    """
    base = bare(model)
    found = find_groups(base)
    if found.known:
        return found.groups
    found_out = verdict(base)
    return [
        replace(group, permutable=False, reason=reason)
        if group.permutable and (reason := found_out.against(group))
        else group
        for group in found.groups
    ]
