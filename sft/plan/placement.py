"""Where the bytes of a step lie when a run is shared out or moved off the device."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.plan.depth import Found
from sft.plan.timeline import (
    ACTIVATIONS,
    GRADIENTS,
    INDICES,
    KINDS,
    OPTIMIZER,
    ORIGINALS,
    TRAINED,
    TRANSIENTS,
    WEIGHTS,
)
from sft.recipe.schema import Recipe

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
OFFLOADED = ("optimizer", "base")
# DeepSpeed's default: entries of gradients that are reduced at a time
BUCKET = 500_000_000
ENGINE = "engine"


@dataclass(frozen=True)
class Placement:
    """How a run is shared out.

    Args:
        world: processes, one device each.
        engine: None for one process, or one of `ENGINES`.
        offload: what is kept in the host's memory, of `OFFLOADED`.
    """

    world: int = 1
    engine: str | None = None
    offload: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.world < 1:
            raise UserError(f"--world: got {self.world}, allowed is a number of processes from 1")
        unknown = sorted(self.offload - set(OFFLOADED))
        if unknown:
            allowed = " or ".join(OFFLOADED)
            raise UserError(f"--offload: got {unknown[0]!r}, allowed is {allowed}")

    @property
    def aside(self) -> bool:
        """Whether weights are not here to be written to, so that layers run beside them."""
        return self.engine in ("zero3", "fsdp") or "base" in self.offload

    @property
    def name(self) -> str:
        """As shown."""
        parts = [self.engine or ("ddp" if self.world > 1 else "")]
        parts += [f"{what} offloaded" for what in sorted(self.offload)]
        return ", ".join(filter(None, parts)) or "whole on each device"

    def share(self, kind: str) -> float:
        """Return what part of a kind's bytes lies on a device."""
        if kind == OPTIMIZER and "optimizer" in self.offload:
            return 0.0
        if kind == WEIGHTS and "base" in self.offload:
            return 0.0
        return 1 / self.world if kind in _SHARDED[self.engine or "ddp"] else 1.0

    def on_host(self, found: Found, trained: int) -> Counter[str]:
        """Return the bytes in the host's memory for each process, by kind."""
        host: Counter[str] = Counter()
        sharded = _SHARDED[self.engine or "ddp"]
        for what, kind in (("optimizer", OPTIMIZER), ("base", WEIGHTS)):
            if what in self.offload:
                host[kind] = found.held(kind) // (self.world if kind in sharded else 1)
        if "optimizer" in self.offload and self.engine in ("zero1", "zero2", "zero3"):
            host[GRADIENTS] = found.most(GRADIENTS) // self.world
            host[TRAINED] = self.masters(found, trained)
        return +host

    def masters(self, found: Found, trained: int) -> int:
        """Return the bytes of ZeRO's float32 copies of trained weights, and moments as wide.

        Args:
            found: the step.
            trained: number of trained weights.
        """
        if self.engine not in ("zero1", "zero2", "zero3"):
            return 0
        halves = found.held(TRAINED) < 3 * trained  # stepped as they are, moments would be halves
        return (4 * trained + halves * found.held(OPTIMIZER)) // self.world

    def of_engine(self, found: Found, gathered: int, trained: int) -> int:
        """Return the bytes that the engine takes on a device for itself.

        Args:
            found: the step.
            gathered: bytes of the weights that are whole at once.
            trained: number of trained weights.
        """
        gradients = found.most(GRADIENTS)
        taken = 0 if "optimizer" in self.offload else self.masters(found, trained)
        if self.engine in ("zero1", "zero2", "zero3"):
            taken += min(2 * BUCKET, gradients)
        elif self.engine == "fsdp":
            taken += gathered  # the layer that computes, and the next one
        elif self.world > 1:
            taken += gradients  # DDP's buckets
        if self.engine == "zero3" or "base" in self.offload:
            taken += gathered
        return taken


def placement_of(
    recipe: Recipe, world: int, zero: int | None, fsdp: bool, offload: str | None
) -> Placement:
    """Return how a run is shared out: by the options, or else by the recipe's own sections.

    Raises:
        UserError: an option is out of range.
    """
    if zero not in (None, 0, 1, 2, 3):
        raise UserError(f"--zero: got {zero}, allowed is 0, 1, 2 or 3")
    if zero and fsdp:
        raise UserError("--fsdp: got --zero as well; keep one of them")
    stage, parts = _deepspeed(recipe.training.get("deepspeed"))
    if recipe.offload is not None:
        parts |= {what for what in OFFLOADED if getattr(recipe.offload, what) is not None}
    if offload is not None:
        parts = {part.strip() for part in offload.split(",") if part.strip()}
    stage = stage if zero is None else zero
    engine = "fsdp" if fsdp else f"zero{stage}" if stage else None
    return Placement(world, engine, frozenset(parts))


def _deepspeed(section: Any) -> tuple[int, set[str]]:
    """Return stage and offloaded parts of a DeepSpeed configuration, inline or a file."""
    if isinstance(section, str):
        path = Path(section)
        section = json.loads(path.read_text()) if path.is_file() else None
    found = (section or {}).get("zero_optimization", {})
    keys = {"offload_optimizer": "optimizer", "offload_param": "base"}
    parts = {
        what
        for key, what in keys.items()
        if found.get(key, {}).get("device", "none") in ("cpu", "nvme")
    }
    return int(found.get("stage", 0)), parts


_SHARDED: dict[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero1": frozenset({OPTIMIZER}),
    "zero2": frozenset({OPTIMIZER, GRADIENTS}),
    "zero3": frozenset({OPTIMIZER, GRADIENTS, WEIGHTS, TRAINED}),
    "fsdp": frozenset({OPTIMIZER, GRADIENTS, WEIGHTS, TRAINED}),
}
SHOWN = (WEIGHTS, TRAINED, INDICES, ORIGINALS, OPTIMIZER, GRADIENTS, ACTIVATIONS, TRANSIENTS)
assert set(SHOWN) == set(KINDS)


def peak_on_device(found: Found, placement: Placement, gathered: int, trained: int) -> Counter[str]:
    """Return the bytes at the peak on one device, by kind, the engine's own included."""
    peaks = found.peaks(placement.share)
    parts = max(peaks.values(), key=lambda part: sum(part.values()))
    return +(parts + Counter({ENGINE: placement.of_engine(found, gathered, trained)}))
