"""One layer's gradient window: candidates and their accumulated gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sft.adapters.deltas.mean_outer import shared
from sft.adapters.deltas.site import DeltaSite
from sft.adapters.ranks import ALONE, Ranks
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
        name: the module.
        ranks: the processes that choose together, by the mean of their gradients.
    """

    def __init__(
        self,
        site: DeltaSite,
        *,
        include_active: bool,
        whole_update: bool,
        name: str = "",
        ranks: Ranks = ALONE,
    ) -> None:
        self._site = site
        self._name, self._ranks = name, ranks
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
            mean = shared(outer, self._ranks, self._name)
            chosen = topk_outer(mean, len(active), None if self._include_active else active)
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

    @property
    def waits(self) -> bool:
        """Whether it has to choose candidates by a dense gradient, once the update is whole."""
        return self._candidates is None and self._whole_update

    def share_dense(self) -> None:
        """Take the mean over the ranks of the dense gradient, row block by row block."""
        rows, cols = self._site.pattern.shape
        if self._dense is None:
            device = self._site.pattern.indices.device
            self._dense = torch.zeros(rows * cols, device=device)
        for block in torch.split(self._dense, rows_per_block(cols, 4) * cols):
            block.copy_(self._ranks.mean(block))

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


def share_updates(windows: Sequence[Window], ranks: Ranks) -> None:
    """Let the gradients of one update be the means over the ranks, in all windows of a model.

    A rank whose batches did not reach a layer counts with zeros. Called before `close_update`, by
    every rank.
    """
    if ranks.count == 1:
        return
    waiting = [window for window in windows if window.waits]
    seen = ranks.gather([float(window._dense is not None) for window in waiting])
    for window, somewhere in zip(waiting, zip(*seen, strict=True), strict=True):
        if any(somewhere):
            window.share_dense()
    chosen = [window for window in windows if window._candidates is not None]
    if not chosen:
        return
    parts = [_with_mark(window._update, len(window.candidates)) for window in chosen]
    device = chosen[0].candidates.device
    found = ranks.mean(torch.cat([part.to(device) for part in parts]))
    sizes = [len(part) for part in parts]
    for window, mean in zip(chosen, torch.split(found, sizes), strict=True):
        window._update = mean[:-1].to(window.candidates.device) if mean[-1] > 0 else None


def _with_mark(update: Tensor | None, count: int) -> Tensor:
    """Return an update and behind it a 1; zeros where there is none."""
    if update is None:
        return torch.zeros(count + 1)
    return torch.cat([update, update.new_ones(1)])


def _pattern(chosen: Tensor, active: Pattern) -> Pattern:
    return Pattern(as_indices(chosen, active.shape, chosen.device), active.shape)


def _add_dense(dense: Tensor | None, outer: Outer) -> Tensor:
    rows, cols = outer.shape
    step = rows_per_block(cols, 4)
    blocks = [outer.block(start, min(start + step, rows)) for start in range(0, rows, step)]
    gradient = torch.cat(blocks).view(-1)
    return gradient if dense is None else dense.add_(gradient)
