"""Noise drawn ahead for modules that run one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft.kernels.displace import draw_ahead
from sft.optim.zeroth_order.modes import Draws
from sft.optim.zeroth_order.trained import Trained

BYTES = 2**19  # of noise at a time
BITS = {"rademacher": 1, "gaussian_table": 16, "gaussian": 32}  # of noise a weight


class Ahead:
    """Draws the noise of several modules at once: a call costs as much as a million bits.

    Args:
        modules: the trained tensors of each module, in the order in which the modules run.
        kind: of the noise.
    """

    def __init__(self, modules: Sequence[Sequence[Trained]], kind: str) -> None:
        self._kind = kind
        self._group: dict[int, int] = {}  # id of a parameter -> number of its group
        self._members: list[list[Trained]] = []
        room = -1
        for trained in modules:
            size = sum(t.parameter.numel() for t in trained) * BITS[kind] // 8
            if any(id(t.parameter) in self._group for t in trained) or size > BYTES:
                room = -1  # large ones gain nothing, tied ones were drawn for another place
                continue
            if size > room:
                self._members.append([])
                room = BYTES
            room -= size
            self._members[-1] += trained
            self._group |= {id(t.parameter): len(self._members) - 1 for t in trained}
        self._now: tuple[int, tuple[int, ...]] | None = None
        self._drawn: Any = None

    def drawn(self, trained: Sequence[Trained], draws: Draws) -> Any:
        """Return what `displace` takes as `drawn` for one of the modules, or None."""
        group = self._group.get(id(trained[0].parameter))
        if group is None:
            return None
        wanted = (group, tuple(key for key, _ in draws))
        if wanted != self._now:
            members = self._members[group]
            sizes = [t.parameter.numel() for t in members]
            device = members[0].parameter.device
            self._drawn = draw_ahead(wanted[1], [t.id for t in members], sizes, self._kind, device)
            self._now = wanted
        return self._drawn
