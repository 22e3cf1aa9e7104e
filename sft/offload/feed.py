"""Brings weights to the device, the next one while the last one is at work."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from sft.offload.store import Store


class _Arrival(NamedTuple):
    """A tensor on the device, and the event after which it is whole there."""

    tensor: Tensor
    event: torch.cuda.Event | None


class Feed:
    """Reads from a store ahead of time, in the order in which tensors were last asked for.

    A thread reads, and on a GPU copies on a stream of its own. No more than one tensor is ahead:
    that is the memory it costs.

    Args:
        store: holds the tensors.
        device: where they are wanted.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._device = store, device
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sft-offload")
        self._ahead: tuple[int, Future[_Arrival]] | None = None
        # a layer is followed by another in forward than in backward: two steps tell which it is
        self._after: dict[tuple[int, int], int] = {}
        self._last = (-1, -1)
        self.hits = 0  # how often what was wanted was on its way

    def fetch(self, key: int) -> Tensor:
        """Return a tensor on the device, and begin to read the one that came after it last time."""
        coming = self._take(key)
        self._after[self._last] = key
        self._last = self._last[1], key
        following = self._after.get(self._last)
        arrival = coming.result()
        if following is not None and following != key:
            self._ahead = following, self._thread.submit(self._bring, following)
        if arrival.event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrival.event)
            arrival.tensor.record_stream(current)
        return arrival.tensor

    def close(self) -> None:
        """End the thread."""
        self._ahead = None
        self._thread.shutdown()

    def _take(self, key: int) -> Future[_Arrival]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == key:
            self.hits += 1
            return ahead[1]
        return self._thread.submit(self._bring, key)

    def _bring(self, key: int) -> _Arrival:
        read = self._store.read(key)
        if self._stream is None:
            return _Arrival(read.to(self._device), None)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            tensor = read.to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return _Arrival(tensor, event)
