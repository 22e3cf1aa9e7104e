"""What SoRA's gates do while training: stages of the penalty, and dead ranks that leave."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from sft.adapters.dynamics import Accumulators, Penalty, SupportChange
from sft.adapters.gates.layer import RANK_DIM, GatedLinear
from sft.adapters.gates.stages import stage_of
from sft.adapters.gathered import gathered
from sft.adapters.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)


class RankDynamics:
    """Sets the penalty's strength by stage, and lets ranks leave whose gate stays at 0.

    Every `compact_after` updates the ranks leave whose gate was 0 after each update since the last
    look: rows of A, columns of B, gates, and their optimizer state. The output does not change, but
    such a rank cannot come back.

    Args:
        layers: by module name.
        adapter: the adapter.
        penalty: of all its gates.
        strengths: one for each stage.
        ends: updates after which each stage ends.
        compact_after: updates between looks, or None to keep all ranks.
    """

    reads_gradients = False
    reads_accumulators = False

    def __init__(
        self,
        layers: dict[str, GatedLinear],
        adapter: str,
        *,
        penalty: Penalty,
        strengths: Sequence[float],
        ends: Sequence[int],
        compact_after: int | None,
    ) -> None:
        self.layers, self.adapter, self.penalty = layers, adapter, penalty
        self.strengths, self.ends, self.compact_after = strengths, ends, compact_after
        self.most = sum(layer.max_rank[adapter] for layer in layers.values())
        self._alive = torch.zeros_like(self._gates(), dtype=torch.bool)
        self.one_process: str | None = None
        self.ranks: Ranks = ALONE
        if compact_after is not None:
            self.one_process = (
                f"compact_after: got {compact_after} on several processes, whose gradient buckets "
                "are laid out for the ranks at the start; set compact_after=None or run one process"
            )

    def before_update(self, step: int, micro_batches: int) -> None:
        """Set the strength of the stage that the update belongs to."""
        self.penalty.strength = self.strengths[stage_of(step, self.ends)]

    def after_gradients(self, scale: float) -> None:
        """Nothing to take in."""

    def after_update(self, step: int, accumulators: Accumulators) -> list[SupportChange]:
        """Note which gates are open; let those leave that never were since the last look."""
        if self.compact_after is None:
            return []
        self._alive |= self._gates() != 0
        if step % self.compact_after:
            return []
        changes = self._compact(step)
        self._alive = torch.zeros_like(self._gates(), dtype=torch.bool)
        return changes

    def close(self) -> None:
        """Nothing listens."""

    def state(self) -> dict[str, Tensor]:
        """Return which gates were open since the last look."""
        return {"alive": self._alive}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of `state` back."""
        self._alive = tensors["alive"].to(self._alive.device)

    def metrics(self) -> dict[str, float]:
        """Return how many ranks are open: in all, in the mean over the layers, and the rest."""
        open_gates = int((self._gates() != 0).sum())
        return {
            "sora_strength": self.penalty.strength,
            "sora_ranks": open_gates,
            "sora_mean_rank": open_gates / len(self.layers),
            "sora_zero_gates": 1 - open_gates / self.most,
        }

    def _gates(self) -> Tensor:
        layers = self.layers.values()
        with gathered(layer.sora_gate[self.adapter] for layer in layers):
            return torch.cat([layer.sora_gate[self.adapter].detach() for layer in layers])

    def _compact(self, step: int) -> list[SupportChange]:
        sizes = [len(layer.sora_gate[self.adapter]) for layer in self.layers.values()]
        alive = torch.split(self._alive, sizes)
        left = int(self._alive.sum())
        if left == len(self._alive):
            return []
        if not left:
            logger.warning("step %d: no gate is open, so no rank leaves: lower the strength", step)
            return []
        changes = []
        for (name, layer), open_here in zip(self.layers.items(), alive, strict=True):
            if not bool(open_here.all()):
                changes += self._shrink(name, layer, open_here.nonzero().flatten())
        logger.info("step %d: %d ranks leave, %d stay", step, len(self._alive) - left, left)
        return changes

    def _shrink(self, name: str, layer: GatedLinear, kept: Tensor) -> list[SupportChange]:
        layer.keep_ranks(self.adapter, kept)
        return [
            SupportChange(
                name=name, parameter=getattr(layer, part)[self.adapter], source=kept, dim=dim
            )
            for part, dim in RANK_DIM.items()
        ]
