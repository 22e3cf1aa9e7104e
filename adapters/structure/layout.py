"""What the map reads of a model's modules: children by path, stored axes, head sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sft.adapters.geometry import Kind, layer_kind
from sft.adapters.structure.groups import IndexRule, Member, Role

# Where modules keep the size of a head. A configuration's hidden_size / heads isn't it: Gemma,
# Qwen3 and Mistral-Nemo set the size on its own.
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


@dataclass(frozen=True)
class Site:
    """A module that may hold a group: its path in the model, itself, its configuration."""

    path: str
    module: nn.Module
    config: Any

    def child(self, name: str) -> nn.Module | None:
        """Return the descendant at a dotted path, without an adapter's wrapping, or None."""
        found: nn.Module | None = self.module
        for part in name.split("."):
            found = found._modules.get(part) if found is not None else None
        return unwrapped(found) if found is not None else None

    def full(self, name: str) -> str:
        """Return the path of a child in the model."""
        return f"{self.path}.{name}" if self.path else name

    def setting(self, name: str) -> Any:
        """Return a setting of the module's own configuration, or None."""
        return getattr(getattr(self.module, "config", self.config), name, None)


@dataclass(frozen=True)
class Matrix:
    """A linear layer as stored: its path, how many features on which axis, its bias."""

    path: str
    inputs: int
    outputs: int
    input_axis: int
    biased: bool

    def producer(self, role: Role, rule: IndexRule, shared: int = 1) -> Member:
        """Return this matrix as one whose output features are the units."""
        return Member(
            role=role,
            module=self.path,
            parameter="weight",
            axis=1 - self.input_axis,
            extent=self.outputs,
            rule=rule,
            bias="bias" if self.biased else None,
            shared=shared,
        )

    def consumer(self, role: Role, rule: IndexRule) -> Member:
        """Return this matrix as one whose input features are the units."""
        return Member(
            role=role,
            module=self.path,
            parameter="weight",
            axis=self.input_axis,
            extent=self.inputs,
            rule=rule,
        )


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module under the adapters around it."""
    while isinstance(inner := module._modules.get("base_layer"), nn.Module):
        module = inner
    return module


def matrix(site: Site, name: str) -> Matrix | None:
    """Return the linear layer at a child's path, quantised ones included; None if there is none."""
    module = site.child(name)
    if module is None:
        return None
    biased = getattr(module, "bias", None) is not None
    if layer_kind(module) is Kind.CONV1D:
        inputs, outputs = int(module.nx), int(module.nf)  # type: ignore[arg-type]
        return Matrix(site.full(name), inputs, outputs, input_axis=0, biased=biased)
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not (isinstance(sizes[0], int) and isinstance(sizes[1], int)):
        return None
    return Matrix(site.full(name), sizes[0], sizes[1], input_axis=1, biased=biased)


def head_size(site: Site, query: str) -> int | None:
    """Return the size of a head: the attention module's own attribute, else its configuration's.

    Args:
        site: the attention module.
        query: path of the query projection in it; BERT keeps the size on the module around it.
    """
    owner = site.child(query.rpartition(".")[0]) if "." in query else None
    for holder in (owner, site.module, getattr(site.module, "config", site.config)):
        for name in HEAD_SIZES:
            size = getattr(holder, name, None)
            if isinstance(size, int) and size > 0:
                return size
    return None
