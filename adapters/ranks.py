"""The processes of a run, as what is chosen from gradients sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """Processes that train one model together; every verb is called by all of them."""

    rank: int
    count: int

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the ranks: a new tensor, the same bits on each."""

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of each rank, in fp64, in the order of the ranks."""

    def check_alike(self, what: str, checksum: int) -> None:
        """Raise RuntimeError if the ranks disagree.

        Args:
            what: names it in the message.
            checksum: of what must be the same, up to 63 bits.
        """


class Alone:
    """One process."""

    rank = 0
    count = 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return its own numbers."""
        return [list(numbers)]

    def check_alike(self, what: str, checksum: int) -> None:
        """One process agrees with itself."""


ALONE: Ranks = Alone()


class ProcessGroup:
    """The ranks of torch.distributed, on a process group of their own.

    A group of its own, since DDP and DeepSpeed reduce gradients while backward runs: what is
    reduced here must not get in between.

    Args:
        device: where the group's collectives take their tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = torch.distributed.get_rank()
        self.count = torch.distributed.get_world_size()
        self._device = device
        self._group = torch.distributed.new_group()

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the ranks: a new tensor, the same bits on each."""
        total = tensor.detach().to(self._device).clone().contiguous()
        torch.distributed.all_reduce(total, group=self._group)
        return (total / self.count).to(tensor.device)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of each rank."""
        mine = torch.tensor(list(numbers), dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(mine) for _ in range(self.count)]
        torch.distributed.all_gather(rows, mine, group=self._group)
        return [row.tolist() for row in rows]

    def check_alike(self, what: str, checksum: int) -> None:
        """Raise RuntimeError if the ranks disagree."""
        mine = torch.tensor([checksum], dtype=torch.int64, device=self._device)
        rows = [torch.empty_like(mine) for _ in range(self.count)]
        torch.distributed.all_gather(rows, mine, group=self._group)
        found = [int(row) for row in rows]
        if len(set(found)) > 1:
            shown = ", ".join(f"{sum_:016x}" for sum_ in found)
            raise RuntimeError(
                f"{what}: differs between the ranks ({shown}), so they no longer train one model; "
                "start again from the last checkpoint"
            )
