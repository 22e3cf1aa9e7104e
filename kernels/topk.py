"""Exact, deterministic top-k of a stream of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.kernels.library import define


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest scores; of equal scores the lowest positions win.

    Args:
        scores: (n,) no NaN.
        k: how many, clipped to n.

    Returns:
        (min(k, n),) int64 ascending. `torch.topk` breaks ties differently from device to device.
    """
    if k <= 0 or scores.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    if k >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    found: Tensor = TOP_K(scores, k)
    return found


def _top_k(scores: Tensor, k: int) -> Tensor:
    likely = _likely(scores, k)
    if likely is None:
        return _select(scores, k)
    return likely[_select(scores[likely], k)]


TOP_K = define(
    "top_k(Tensor scores, int k) -> Tensor",
    plain=_top_k,
    triton="select:top_k",
    fake=lambda scores, k: scores.new_empty(k, dtype=torch.int64),
)


def _select(scores: Tensor, k: int) -> Tensor:
    threshold = torch.topk(scores, k, sorted=False).values.min()
    above = (scores > threshold).nonzero().flatten()
    ties = (scores == threshold).nonzero().flatten()[: k - above.numel()]
    return torch.cat([above, ties]).sort().values


# One score in so many is sampled, when at least so many would be kept of the sample.
_STRIDE, _LEAST = 16, 32


def _likely(scores: Tensor, k: int) -> Tensor | None:
    """Return positions that hold the k largest, found by a sample's threshold, or None.

    Any k or more scores above a threshold hold the k largest, whatever the sample was; partial
    sorting of the few that are left costs a fraction of sorting all (1/5 at k = 0.5%).
    """
    wanted = 2 * k // _STRIDE
    if wanted < _LEAST or 8 * k > scores.numel():
        return None
    sample = scores[::_STRIDE]
    floor = torch.topk(sample, min(wanted, sample.numel()), sorted=False).values.min()
    likely = (scores >= floor).nonzero().flatten()
    return likely if likely.numel() >= k else None


class StreamingTopK:
    """The k largest of scores that arrive in blocks of ascending positions.

    Keeps k entries, never the stream: memory is O(k + block).

    Args:
        k: how many to keep.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._scores: Tensor | None = None
        self._positions: Tensor | None = None

    def push(self, scores: Tensor, offset: int) -> None:
        """Take in the block that starts at flat position `offset`; -inf marks excluded entries."""
        # an entry equal to the current k-th loses to it: it has the higher position
        floor = self._floor()
        kept = (scores > floor).nonzero().flatten()
        new_scores, new_positions = scores[kept], kept + offset
        if self._scores is not None and self._positions is not None:
            new_scores = torch.cat([self._scores, new_scores])
            new_positions = torch.cat([self._positions, new_positions])
        best = top_k(new_scores, self.k)
        self._scores, self._positions = new_scores[best], new_positions[best]

    def _floor(self) -> float:
        if self._scores is None or self._scores.numel() < max(1, self.k):
            return float("-inf")
        return float(self._scores.min())

    def positions(self) -> Tensor:
        """Return the kept flat positions: (<= k,) int64 ascending."""
        if self._positions is None:
            return torch.empty(0, dtype=torch.int64)
        return self._positions


def top_k_reference(scores: Tensor, k: int) -> Tensor:
    """Oracle of `top_k` and `StreamingTopK`: a stable Python sort."""
    order = sorted(range(scores.numel()), key=lambda j: (-scores[j].item(), j))
    return torch.tensor(sorted(order[:k]), dtype=torch.int64)
