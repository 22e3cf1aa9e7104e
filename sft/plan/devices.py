"""Devices that a run is planned for: memory, arithmetic, bandwidth."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

import torch

from sft.errors import UserError, unknown_name

GIB = 2**30
# Of vendors' peaks, what training reaches: an assumption, as no timing of theirs was made here.
ARITHMETIC, BANDWIDTH = 0.5, 0.75
# What a process takes on a GPU before its first tensor, with its libraries' workspaces.
CONTEXT = 640 * 2**20
# Of what a caching allocator holds, what is lost between blocks.
FRAGMENTS = 0.03
# An operation is not quicker than this, whatever it does: its launch, or its call.
LAUNCH = {"gpu": 4e-6, "cpu": 6e-6}


@dataclass(frozen=True)
class Device:
    """Something to train on.

    Args:
        name: as shown.
        memory: bytes that tensors can have.
        kind: "gpu" or "cpu".
        half: floating point operations a second in bfloat16 (float16 where there is none), as
            reached; None if not known.
        single: in float32.
        bandwidth: bytes a second, as reached.
    """

    name: str
    memory: int
    kind: str = "gpu"
    half: float | None = None
    single: float | None = None
    bandwidth: float | None = None

    @property
    def overhead(self) -> int:
        """Bytes that a process takes besides its tensors."""
        return CONTEXT if self.kind == "gpu" else 0


# Of data sheets: GiB that a process can have, dense TFLOPS in half and single precision, GB/s.
_TABLE = {
    "b200": (178.0, 2250, 80, 8000),
    "h200": (139.8, 989, 67, 4800),
    "h100-80gb": (79.1, 989, 67, 3350),
    "h100-pcie": (79.1, 756, 51, 2000),
    "a100-80gb": (79.1, 312, 19.5, 2039),
    "a100-40gb": (39.4, 312, 19.5, 1555),
    "l40s": (44.4, 362, 91.6, 864),
    "a6000": (47.4, 155, 38.7, 768),
    "rtx5090": (31.3, 209, 104.8, 1792),
    "rtx4090": (23.5, 165, 82.6, 1008),
    "rtx3090": (23.6, 71, 35.6, 936),
    "a10": (22.0, 125, 31.2, 600),
    "l4": (22.0, 121, 30.3, 300),
    "v100-32gb": (31.7, 125, 15.7, 900),
    "t4": (14.7, 65, 8.1, 320),
    "mi300x": (191.5, 1307, 163, 5300),
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib)", re.IGNORECASE)


def device_of(text: str | None) -> Device:
    """Return the device that a user names: of the table, a memory size, or None: this machine.

    Raises:
        UserError: there is none of that name.
    """
    if text is None or text == "this":
        return this_machine()
    size = _SIZE.fullmatch(text.strip())
    if size is not None:
        unit = GIB if size[2].lower().startswith("g") else 2**20
        return Device(f"a GPU of {text}", round(float(size[1]) * unit))
    name = text.strip().lower().replace("_", "-")
    if name not in _TABLE:
        hint = unknown_name(name, _TABLE, kind="device")
        raise UserError(f"--gpu: got {text!r}: {hint}; or give its memory, such as 24GB")
    memory, half, single, bandwidth = _TABLE[name]
    return Device(
        name,
        round(memory * GIB),
        half=half * 1e12 * ARITHMETIC,
        single=single * 1e12 * ARITHMETIC,
        bandwidth=bandwidth * 1e9 * BANDWIDTH,
    )


def this_machine() -> Device:
    """Return the device that a run would take here: its first GPU, or the CPU as it is measured."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        known = {
            name for name in _TABLE if name.split("-")[0] in found.name.lower().replace(" ", "")
        }
        if known:
            best = min(known, key=lambda n: abs(_TABLE[n][0] * GIB - found.total_memory))
            return device_of(best)
        return Device(found.name, found.total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        f"this CPU, {torch.get_num_threads()} threads",
        memory,
        "cpu",
        half=_products(torch.bfloat16),
        single=_products(torch.float32),
        bandwidth=_copies(),
    )


def _products(dtype: torch.dtype, side: int = 768) -> float:
    """Measure the floating point operations a second of a matrix product."""
    left = torch.ones(side, side, dtype=dtype)
    return 2 * side**3 / _best(lambda: left @ left)


def _copies(size: int = 2**24) -> float:
    """Measure the bytes a second that a sum of two tensors moves."""
    left = torch.ones(size // 4)
    out = torch.empty_like(left)
    return 3 * size / _best(lambda: torch.add(left, left, out=out))


def _best(run: object, rounds: int = 4) -> float:
    assert callable(run)
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
