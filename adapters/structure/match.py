"""Match a model's modules against the forms its family is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sft.adapters.structure.by_look import ATTENTION_BY_NAME, FEED_FORWARD_BY_SHAPE
from sft.adapters.structure.families import FAMILIES, REFUSED, Template
from sft.adapters.structure.groups import CoupledGroup
from sft.adapters.structure.layout import Site, unwrapped


@dataclass(frozen=True)
class Found:
    """The groups of a model, and whether its family is one we know."""

    groups: list[CoupledGroup]
    known: bool


def find_groups(model: nn.Module) -> Found:
    """Return the groups of a bare model, unchecked where the family is unknown.

    Raises:
        ValueError: no group at all, a family that is refused, or layers that share a matrix.
    """
    config = getattr(model, "config", None)
    types = model_types(config)
    refused = [name for name in types if name in REFUSED]
    if refused:
        raise ValueError(
            f"model_type: got {refused[0]!r}, allowed is a family with coupled units: "
            f"{REFUSED[refused[0]]}; remedy: use another method"
        )
    known = is_known(config)
    chosen = [FAMILIES[name] for name in types if name in FAMILIES]
    templates = [form for family in chosen for form in family.templates]
    groups = match(model, config, templates) if known else match_unknown(model, config)
    if not groups:
        name = types[0] if types else type(model).__name__
        raise ValueError(
            f"model_type: got {name!r}, allowed is a family of adapters/structure/families.py or a "
            "model with modules like (q, k, v, o) whose head size is known, or (gate, up, down): "
            "found neither; remedy: name its modules there, or use another method"
        )
    refuse_shared(model, groups)
    return Found(groups, known)


def match(model: nn.Module, config: Any, templates: Iterable[Template]) -> list[CoupledGroup]:
    """Return the groups of every module that has the form of a template, the first that fits."""
    forms = list(dict.fromkeys(templates))
    found: dict[str, CoupledGroup] = {}
    for path, module in model.named_modules():
        site = Site(path, module, config)
        for form in forms:
            for group in form.groups(site):
                found.setdefault(group.name, group)
    return list(found.values())


def match_unknown(model: nn.Module, config: Any) -> list[CoupledGroup]:
    """Return what looks like a group: by the names of all families, then by name and shape."""
    every = [form for family in FAMILIES.values() for form in family.templates]
    groups = match(model, config, every)
    for form in (ATTENTION_BY_NAME, FEED_FORWARD_BY_SHAPE):
        taken = {member.module for group in groups for member in group.members}
        names = {group.name for group in groups}
        for group in match(model, config, [form]):
            fresh = not any(member.module in taken for member in group.members)
            if fresh and group.name not in names:
                groups.append(group)
    return groups


def refuse_shared(model: nn.Module, groups: Iterable[CoupledGroup]) -> None:
    """Raise if a tensor of a group is known by another name too."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names[id(tensor)].append(name)
    for group in groups:
        for member in group.members:
            module = unwrapped(model.get_submodule(member.module))
            aliases = names.get(id(getattr(module, member.parameter, None)), [])
            if len(aliases) > 1:
                raise ValueError(
                    f"{aliases[0]}: got a tensor shared with {aliases[1]}, allowed is a matrix of "
                    "one layer's own, since its units would be trained in all layers at once; "
                    "remedy: exclude the shared layers or use another method"
                )


def bare(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PeftModel, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    assert isinstance(inner, nn.Module)
    return inner


def inner_configs(config: Any) -> list[Any]:
    """Return the configurations of a composite model's parts."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return [part for part in parts if part is not None]


def model_types(config: Any) -> list[str]:
    """Return the model types of a configuration and of its parts."""
    own = getattr(config, "model_type", None)
    types = [own] if isinstance(own, str) and own else []
    for part in inner_configs(config):
        types += model_types(part)
    return list(dict.fromkeys(types))


def is_known(config: Any) -> bool:
    """Tell whether a configuration's family, or that of every part of it, is in the table."""
    if getattr(config, "model_type", None) in FAMILIES:
        return True
    parts = inner_configs(config)
    return bool(parts) and all(is_known(part) for part in parts)
