"""Which matrices a structured method trains: the model's coupled groups, narrowed by names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sft.adapters.geometry import Kind, layer_kind
from sft.adapters.slices.units import LOOSE, UnitGroup, loose_group, unit_groups
from sft.adapters.structure.find import coupled_groups
from sft.adapters.structure.groups import CoupledGroup
from sft.adapters.structure.layout import unwrapped


def target_groups(model: nn.Module, config: Any) -> list[UnitGroup]:
    """Return what an adapter trains, and write the names of its modules to the configuration.

    Args:
        model: the base model.
        config: with roles, attention_unit, target_modules, exclude_modules and modules_to_save.

    Raises:
        ValueError: a module named by hand has no part in it, with the reason; or none is left.
    """
    coupled = coupled_groups(model) if set(config.roles) != {LOOSE} else []
    roles = [role for role in config.roles if role != LOOSE]
    groups = unit_groups(model, coupled, roles, config.unit) if roles else []
    if config.target_modules is None and roles:
        config.target_modules = {slot.module for group in groups for slot in group.slots}
    elif config.target_modules is None or config.target_modules == "all-linear":
        raise ValueError(
            f"target_modules: got {config.target_modules!r}, allowed are names of matrices in "
            f"roles {config.roles}; leave it out to train all of these, but name those of 'any'"
        )
    known = {slot.module for group in groups for slot in group.slots}
    matched = dict(_matched(model, config))
    for name, module in matched.items():
        if name not in known:
            groups.append(_loose(name, module, config, coupled))
    groups = list(_narrowed(groups, matched))
    if not groups:
        raise ValueError(
            f"target_modules: got {config.target_modules!r}, which leaves no matrix of roles "
            f"{config.roles}; name some, or leave target_modules and exclude_modules out"
        )
    config.target_modules = {slot.module for group in groups for slot in group.slots}
    return groups


def excluded_features(folders: Iterable[str]) -> dict[str, Tensor]:
    """Return by module the features that saved adapters train.

    Raises:
        ValueError: a folder holds no adapter with slices.
    """
    found: dict[str, list[Tensor]] = {}
    for folder in folders:
        file, ending = Path(folder) / SAFETENSORS_WEIGHTS_NAME, ".s2ft_indices"
        if not file.is_file():
            raise ValueError(f"exclude: got {folder!r}, which holds no {file.name}; save one there")
        with safe_open(file, framework="pt") as tensors:
            keys = [key for key in tensors.keys() if key.endswith(ending)]  # noqa: SIM118
            for key in keys:
                module = key.removeprefix("base_model.model.").removesuffix(ending)
                found.setdefault(module, []).append(tensors.get_tensor(key))
        if not keys:
            raise ValueError(f"exclude: got {folder!r}, allowed are folders of S2FT adapters")
    return {module: torch.unique(torch.cat(parts)) for module, parts in found.items()}


def _matched(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the configuration's names match, as PEFT matches them."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
        if name and check_target_module_exists(config, name):
            yield name, module


def _narrowed(groups: Sequence[UnitGroup], names: Iterable[str]) -> Iterator[UnitGroup]:
    names = set(names)
    for group in groups:
        slots = tuple(slot for slot in group.slots if slot.module in names)
        if slots:
            yield replace(group, slots=slots)


def _loose(name: str, module: nn.Module, config: Any, coupled: Sequence[CoupledGroup]) -> UnitGroup:
    base = unwrapped(module)
    linear = layer_kind(base) in (Kind.LINEAR, Kind.CONV1D)
    bypassed = isinstance(base, NonDynamicallyQuantizableLinear)
    parts = [(m.role, g.name) for g in coupled for m in g.members if m.module == name]
    if parts:
        role, group = parts[0]
        reason = f"the {role!r} of {group!r}, and roles is {config.roles}; add {role!r} to roles"
    elif not linear:
        reason = f"a {type(base).__name__}; allowed are nn.Linear and transformers' Conv1D"
    elif bypassed:
        reason = "never called by its nn.MultiheadAttention, so it would not train; leave it out"
    elif LOOSE not in config.roles:
        reason = (
            "a matrix of no attention or feed-forward structure that is known here; leave it out, "
            "or add 'any' to roles to train some of its input features"
        )
    else:
        return loose_group(name, base)
    raise ValueError(f"target_modules: {name!r} is {reason}")
