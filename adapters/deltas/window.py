"""One layer's gradient window: candidates and their accumulated gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.adapters.deltas.site import DeltaSite
from sft.adapters.support import as_indices
from sft.kernels.outer import Outer
from sft.kernels.outer_at import rows_per_block
from sft.kernels.pattern import Pattern
from sft.kernels.topk import top_k
from sft.kernels.topk_outer import topk_outer


class Window:
    """Accumulates the gradient of candidate positions over the updates of a window.

    All sums are float32 and per update: micro-batch gradients are added up first, then squared, so
    that the means do not depend on how an update was split. Counters are Python integers.

    Args:
        site: whose tap is fed by backward.
        include_active: let active positions be candidates, as the authors do.
        whole_update: choose the candidates by the gradient of the first whole update. That takes a
            dense gradient of the layer for one update; otherwise its first backward pass decides,
            one row block at a time.
    """

    def __init__(self, site: DeltaSite, *, include_active: bool, whole_update: bool) -> None:
        self._site = site
        self._include_active = include_active
        self._whole_update = whole_update
        self._candidates: Pattern | None = None
        self._dense: Tensor | None = None
        self._update: Tensor | None = None
        self.total: Tensor | None = None
        self.total_square: Tensor | None = None
        self.updates = 0
        site.tap = self.observe

    @property
    def candidates(self) -> Tensor:
        """The candidate positions: (c,), ascending; empty before the first backward."""
        if self._candidates is None:
            return torch.empty(0, dtype=torch.int64)
        return self._candidates.indices

    def observe(self, outer: Outer) -> None:
        """Take in one backward pass."""
        if self._candidates is None and self._whole_update:
            self._dense = _add_dense(self._dense, outer)
            return
        if self._candidates is None:
            active = self._site.pattern
            chosen = topk_outer(outer, len(active), None if self._include_active else active)
            self._candidates = _pattern(chosen, active)
        gradient = outer.at(self._candidates)
        self._update = gradient if self._update is None else self._update + gradient

    def close_update(self, scale: float) -> None:
        """Fold the gradient of one update in.

        Args:
            scale: what backward's gradients are divided by, so that they are on the scale the
                optimizer applied (see `Dynamics.after_gradients`); 0 voids the update.
        """
        if scale == 0:
            # what was chosen by overflowed gradients is void as well
            if self.updates == 0:
                self._candidates = None
            self._dense = self._update = None
            return
        if self._dense is not None:
            self._choose_from_dense()
        if self._update is None or self._candidates is None:
            return
        gradient = self._update / scale
        self.total = gradient if self.total is None else self.total + gradient
        square = gradient.square()
        self.total_square = square if self.total_square is None else self.total_square + square
        self.updates += 1
        self._update = None

    def _choose_from_dense(self) -> None:
        assert self._dense is not None
        active = self._site.pattern
        scores = self._dense.abs()
        if not self._include_active:
            scores.index_fill_(0, active.indices.long(), float("-inf"))
        chosen = top_k(scores, len(active))
        chosen = chosen[torch.isfinite(scores[chosen])]
        self._candidates = _pattern(chosen, active)
        self._update, self._dense = self._dense[chosen], None

    def close(self) -> None:
        """Stop listening to backward."""
        self._site.tap = None

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that continue this window after the last closed update."""
        tensors = {"updates": torch.tensor(self.updates)}
        if self._candidates is not None and self.total is not None:
            assert self.total_square is not None
            tensors["candidates"] = self._candidates.indices
            tensors["total"], tensors["total_square"] = self.total, self.total_square
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of `state` back."""
        self.updates = int(tensors["updates"])
        if "candidates" in tensors:
            active = self._site.pattern
            device = active.indices.device
            self._candidates = Pattern(tensors["candidates"].to(device), active.shape)
            self.total = tensors["total"].to(device)
            self.total_square = tensors["total_square"].to(device)


def _pattern(chosen: Tensor, active: Pattern) -> Pattern:
    return Pattern(as_indices(chosen, active.shape, chosen.device), active.shape)


def _add_dense(dense: Tensor | None, outer: Outer) -> Tensor:
    rows, cols = outer.shape
    step = rows_per_block(cols, 4)
    blocks = [outer.block(start, min(start + step, rows)) for start in range(0, rows, step)]
    gradient = torch.cat(blocks).view(-1)
    return gradient if dense is None else dense.add_(gradient)
