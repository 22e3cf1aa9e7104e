"""Find the coupled groups of a model: by its family's names, else by their look."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sft.adapters.structure.families import FAMILIES, REFUSED, Template
from sft.adapters.structure.groups import CoupledGroup
from sft.adapters.structure.layout import Site


def coupled_groups(model: nn.Module) -> list[CoupledGroup]:
    """Return the coupled groups of a model, in the order of its modules.

    Call it on the base model, before adapters are injected: names are paths in the model given.
    (Around an injected adapter it looks through `base_layer`, and into a PeftModel at its base
    model, so the names stay the same; only `permute_` insists on a bare model.) No weight is
    read: a model on the meta device will do.

    Raises:
        ValueError: an unknown family in which nothing like attention or a feed-forward is found,
            or matrices that several layers share.
    """
    base = bare(model)
    config = getattr(base, "config", None)
    types = model_types(config)
    for name in types:
        if name in REFUSED:
            raise ValueError(
                f"model_type: got {name!r}, allowed is a family whose layers are its own: "
                f"{REFUSED[name]}; remedy: use another method"
            )
    templates = [t for name in types if name in FAMILIES for t in FAMILIES[name].templates]
    groups = match(base, config, list(dict.fromkeys(templates)))
    if not groups:
        raise ValueError(
            f"model_type: got {types[0] if types else type(base).__name__!r}, allowed is "
            f"{', '.join(sorted(FAMILIES))}; remedy: use another method"
        )
    return groups


def match(model: nn.Module, config: Any, templates: Iterable[Template]) -> list[CoupledGroup]:
    """Return the groups of every module that has the form of one of the templates."""
    found: dict[str, CoupledGroup] = {}
    for path, module in model.named_modules():
        site = Site(path, module, config)
        for template in templates:
            for group in template.groups(site):
                found.setdefault(group.name, group)
    return list(found.values())


def bare(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PeftModel, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def model_types(config: Any) -> list[str]:
    """Return the model types of a configuration and of those inside it."""
    if config is None:
        return []
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    types = [getattr(config, "model_type", "")] + [t for one in inner for t in model_types(one)]
    return list(dict.fromkeys(filter(None, types)))
