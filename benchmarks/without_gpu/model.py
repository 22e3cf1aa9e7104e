"""Lower bounds of a kernel's time on a GPU that is not here: a model, not a measurement.

The slowest of memory, second-level cache, instruction issue and tensor cores, at an efficiency of
each that well-made kernels reach, and never less than a launch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU.

    Args:
        memory: bytes a second.
        cache: bytes a second of the second-level cache; assumed, vendors do not state it.
        bf16: operations a second of dense 16-bit products.
        tf32: of dense float32 products in tf32.
        issue: warp instructions a second.
        launch: seconds.
    """

    memory: float
    cache: float
    bf16: float
    tf32: float
    issue: float
    launch: float = 3e-6


H100 = Device(3.35e12, 5.5e12, 989e12, 494e12, issue=132 * 4 * 1.755e9)
A100 = Device(2.04e12, 4.0e12, 312e12, 156e12, issue=108 * 4 * 1.41e9)

# what well-made kernels reach of each peak
EFFICIENCY = {"memory": 0.9, "cache": 0.8, "issue": 0.8, "tensor": 0.65}


def least_seconds(
    device: Device = H100,
    *,
    memory: float = 0.0,
    cache: float = 0.0,
    instructions: float = 0.0,
    operations: float = 0.0,
    tf32: bool = False,
) -> tuple[float, str]:
    """Return a lower bound, and what sets it.

    Args:
        device: its peaks.
        memory: bytes to and from memory.
        cache: bytes to and from the second-level cache.
        instructions: warp instructions.
        operations: of tensor cores, 2 a multiply-add.
        tf32: operations are on float32.
    """
    peak = device.tf32 if tf32 else device.bf16
    times = {
        "memory": memory / (device.memory * EFFICIENCY["memory"]),
        "cache": cache / (device.cache * EFFICIENCY["cache"]),
        "issue": instructions / (device.issue * EFFICIENCY["issue"]),
        "tensor cores": operations / (peak * EFFICIENCY["tensor"]),
        "launch": device.launch,
    }
    slowest = max(times, key=lambda name: times[name])
    return times[slowest], slowest
