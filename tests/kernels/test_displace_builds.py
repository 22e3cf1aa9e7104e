"""What the compiled code of `displace` and its like moves, of lengths that are no multiples."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from device_cases import displace, displace_at
from device_cases.base import Build
from without_gpu.audit import audit, count, loads
from without_gpu.compiler import compiled_for

# accesses of 128 bits that a thread needs for its share: bytes of a tile, or of a block, by threads
WHOLE: dict[str, tuple[Build, int, int]] = {
    "16-bit weights": (displace.BUILDS["rademacher"], 2, 2),
    "float32 weights": (displace.BUILDS["rademacher, float32"], 4, 4),
    "under a mask": (displace.BUILDS["rademacher, masked by magnitude"], 2, 2),
    "two results of one reading": (displace.BUILDS["rademacher, twice"], 2, 4),
    "normals": (displace.BUILDS["gaussian"], 1, 1),
    "positions": (displace_at.BUILDS["at, rademacher"], 1, 0),
    "rows": (displace_at.BUILDS["rows, rademacher"], 1, 1),
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("build", "read", "written"), WHOLE.values(), ids=WHOLE)
def test_memory_moves_by_128_bits(build: Build, read: int, written: int, target: str) -> None:
    with compiled_for(target) as kernels:
        build.launch()
    found = audit(kernels[0]).instructions
    assert loads(found)[1] == read
    assert count(found, r"STG\..*128.*") == written


@pytest.mark.parametrize("name", ["gaussian", "gaussian_table", "rademacher"])
def test_noise_takes_no_loop_of_its_own(name: str) -> None:
    """One loop, over draws: the device's own sines reduce any angle in loops, and spill."""
    with compiled_for("sm_90") as kernels:
        displace.BUILDS[name].launch()
    assert len(audit(kernels[0]).loops) == 1


@pytest.mark.parametrize(("start", "wide"), [(4096 + 32, True), (4096 + 8, False)])
def test_parts_that_start_between_are_not_read_by_128_bits(start: int, wide: bool) -> None:
    """A tile begins before such a part, at an address that 16 bytes do not divide."""
    from sft.kernels.triton.displace import displace_

    w = [torch.empty(2**14, dtype=torch.bfloat16)]
    with compiled_for("sm_90") as kernels:
        displace_(w, w, [1], [start], [0.0], [0], [0], [0.0], [5], [1.0], "rademacher")
    found = audit(kernels[0]).instructions
    assert bool(loads(found)[1]) == wide
    assert bool(count(found, r"STG\..*128.*")) == wide
