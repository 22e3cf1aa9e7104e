"""Seconds of a step: each operation takes its arithmetic or its bytes, whichever is longer."""

from __future__ import annotations

from sft.plan.depth import Found
from sft.plan.devices import LAUNCH, Device
from sft.plan.timeline import Timeline


def seconds_of(found: Found, device: Device, *, half: bool = False) -> float | None:
    """Return the seconds of a step, or None where the device's speed is not known.

    Args:
        found: the step.
        device: where it runs.
        half: products are taken in half precision.
    """
    speed = device.half if half else device.single
    if speed is None or device.bandwidth is None:
        return None
    least = LAUNCH[device.kind]
    each = [_seconds(t, speed, device.bandwidth, least) for t in found.timelines]
    return found.at_depth(each)


def _seconds(timeline: Timeline, speed: float, bandwidth: float, least: float) -> float:
    return sum(max(w.flops / speed, w.moved / bandwidth, least) for w in timeline.work)
