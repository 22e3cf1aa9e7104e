"""The most memory that a process has held."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Return bytes: the peak of a GPU's allocations, or of the process where the CPU computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
