"""Where weights lie that are not on the device: in memory, or in a file each."""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """Keeps tensors by number."""

    def put(self, key: int, tensor: Tensor) -> None:
        """Keep a tensor."""

    def read(self, key: int) -> Tensor:
        """Return it, in memory."""

    def close(self) -> None:
        """Forget all; no more is read."""


class MemoryStore:
    """Keeps tensors in memory; page-locked if they go to a GPU, which copies those by itself.

    Args:
        device: where they are used.
    """

    def __init__(self, device: torch.device) -> None:
        self._pin = device.type == "cuda"
        self._kept: dict[int, Tensor] = {}

    def put(self, key: int, tensor: Tensor) -> None:
        """Keep a tensor: it itself, if it is in memory already."""
        held = tensor.detach().cpu().contiguous()
        self._kept[key] = held.pin_memory() if self._pin else held

    def read(self, key: int) -> Tensor:
        """Return the tensor that is kept, not a copy."""
        return self._kept[key]

    def close(self) -> None:
        """Forget all."""
        self._kept.clear()


class _File(NamedTuple):
    path: Path
    shape: torch.Size
    dtype: torch.dtype


class DiskStore:
    """Keeps tensors in a file each, in a folder that goes when the store does.

    Args:
        parent: a folder for the store's own folder; made if it is missing.
        device: where tensors are used.
    """

    def __init__(self, parent: Path, device: torch.device) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        mine = f"{_prefix()}{os.getpid()}-"
        self.folder = Path(tempfile.mkdtemp(prefix=mine, dir=parent))
        self._pin = device.type == "cuda"
        self._files: dict[int, _File] = {}
        # at the latest when the process ends
        self._clean = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def put(self, key: int, tensor: Tensor) -> None:
        """Write a tensor to its file."""
        held = tensor.detach().cpu().contiguous()
        self._files[key] = _File(self.folder / str(key), held.shape, held.dtype)
        with self._files[key].path.open("wb") as file:
            file.write(_bytes(held))

    def read(self, key: int) -> Tensor:
        """Read a tensor into memory of its own.

        Raises:
            OSError: the file is gone, or shorter than it was.
        """
        path, shape, dtype = self._files[key]
        tensor = _room(shape, dtype, pin=self._pin)
        with path.open("rb", buffering=0) as file:
            view, done = _bytes(tensor), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise OSError(f"offload.base: {path} ends after {done} of {len(view)} bytes")
                done += count
        return tensor

    def close(self) -> None:
        """Delete the files."""
        self._files.clear()
        self._clean()


def _room(shape: torch.Size, dtype: torch.dtype, *, pin: bool) -> Tensor:
    """Return memory for a tensor; pages of its own, that go when it does.

    What malloc gives for weights that come and go it keeps: half of them were still there.
    """
    if pin:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    pages = mmap.mmap(-1, shape.numel() * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _prefix() -> str:
    return f"weights-{platform.node()}-"


def _sweep(parent: Path) -> None:
    """Delete what processes of this machine left behind that were killed."""
    for folder in parent.glob(f"{_prefix()}*"):
        process = folder.name.removeprefix(_prefix()).partition("-")[0]
        if process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
