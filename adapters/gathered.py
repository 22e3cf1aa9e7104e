"""Parameters of which every process holds a part: whole for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor

Gather = Callable[[Sequence[Tensor]], AbstractContextManager[None]]

OFFLOADED = "sft_offloaded"  # marks a parameter whose content is off its device

_gathers: list[Gather] = []


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters be whole on every rank in the block; what is written to them there stays.

    Every rank enters the block, and writes the same. A sharder may put another object in a
    parameter's place: read it from its module anew inside. Nothing happens where nobody shards.
    """
    wanted = list(parameters)
    with ExitStack() as stack:
        for gather in _gathers:
            stack.enter_context(gather(wanted))
        yield


def for_loss(parameter: Tensor) -> Tensor:
    """Return all of a parameter for a term of the loss; backward reaches each process's share."""
    sharded: Any = parameter
    whole: Tensor = sharded.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole


class Gathering:
    """Lets `gathered` use a function, until `remove`."""

    def __init__(self, gather: Gather) -> None:
        self._gather = gather
        _gathers.append(gather)

    def remove(self) -> None:
        """End it; once is enough."""
        if self._gather in _gathers:
            _gathers.remove(self._gather)


def is_partitioned(tensor: object) -> bool:
    """Tell whether a tensor is a parameter that ZeRO-3 has partitioned: it looks empty."""
    return hasattr(tensor, "ds_id")


def is_away(tensor: object) -> bool:
    """Tell whether a tensor is a parameter that looks empty: partitioned, or offloaded."""
    return is_partitioned(tensor) or hasattr(tensor, OFFLOADED)


def read_whole(tensor: Tensor) -> Tensor:
    """Return a tensor, or a copy of all of it where ranks hold parts of it; collective then."""
    if not is_away(tensor):
        return for_loss(tensor.detach())
    with gathered([tensor]):
        return tensor.detach().clone()
