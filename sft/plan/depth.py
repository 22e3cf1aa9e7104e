"""Plan a deep model by shallow ones: equal layers cost alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from sft.plan.timeline import Share, Timeline

# Depths of the two that stand for a deeper one: in each, first and last layer are apart.
SHALLOW = (2, 4)


@dataclass(frozen=True)
class Stack:
    """A model's layers.

    Args:
        owner: holds them.
        name: as.
        layers: all of them.
    """

    owner: nn.Module
    name: str
    layers: nn.ModuleList

    def cut(self, depth: int) -> None:
        """Leave so many of the layers, the first ones."""
        setattr(self.owner, self.name, self.layers[:depth])

    def restore(self) -> None:
        """Put all layers back."""
        setattr(self.owner, self.name, self.layers)


def equal_stack(model: nn.Module, config: Any) -> Stack | None:
    """Return the model's layers if all of them are alike and enough to be worth it, else None."""
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth <= SHALLOW[1] + 1:
        return None
    kinds = getattr(config, "layer_types", None) or []
    if len(set(kinds)) > 1:
        return None
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                same = len({_signature(layer) for layer in child}) == 1
                return Stack(owner, name, child) if same else None
    return None


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    shapes = tuple((name, _size(t.shape), t.dtype, t.requires_grad) for name, t in tensors)
    return type(layer), shapes


def _size(shape: Any) -> tuple[int, ...]:
    """Take supports that differ by what is left of a division for equal."""
    return tuple(size // 64 if len(shape) == 1 else size for size in shape)


@dataclass(frozen=True)
class Found:
    """What steps told: one of the whole model, or two of shallower ones.

    Args:
        timelines: one, or two.
        depths: of each.
        depth: of the model.
    """

    timelines: tuple[Timeline, ...]
    depths: tuple[int, ...]
    depth: int

    def at_depth(self, values: list[float]) -> float:
        """Draw a line through two numbers; one stands for itself."""
        if len(values) == 1:
            return values[0]
        slope = (values[1] - values[0]) / (self.depths[1] - self.depths[0])
        return values[1] + slope * (self.depth - self.depths[1])

    def peaks(self, share: Share = lambda kind: 1.0) -> dict[str, Counter[str]]:
        """Return for each part of the step the bytes at its peak, by kind."""
        found = [timeline.peaks(share) for timeline in self.timelines]
        return {
            name: Counter(
                {
                    kind: round(self.at_depth([float(peaks[name][kind]) for peaks in found]))
                    for kind in {kind for peaks in found for kind in peaks[name]}
                }
            )
            for name in found[0]
        }

    def held(self, kind: str) -> int:
        """Return the bytes of a kind that live through the step."""
        return round(self.at_depth([float(t.held(kind)) for t in self.timelines]))

    def most(self, kind: str) -> int:
        """Return the most bytes of a kind at once."""
        return round(self.at_depth([float(t.most(kind)) for t in self.timelines]))
