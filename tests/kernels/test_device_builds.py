"""The laws of compiled code: every GPU kernel, for every target, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from device_cases import displace
from device_cases.base import Build, collected
from triton.runtime.jit import KernelInterface
from without_gpu.audit import audit, count, loads
from without_gpu.compiler import TARGETS, compiled_for

from sft.kernels import library
from sft.kernels.triton import displace_at, kept, sampled, select, tiles

BUILDS: dict[str, Build] = collected("BUILDS")
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
# bytes of a program: 99 KiB of the smaller GPUs of these generations, and all that AMD's have
SHARED = dict.fromkeys(NVIDIA, 99 * 2**10) | {"gfx942": 2**16}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_compiled_code(build: Build, target: str) -> None:
    with compiled_for(target) as kernels:
        build.launch()
    assert len(kernels) == build.launches
    for kernel in kernels:
        found = audit(kernel)
        # a sine that reduces any argument keeps a table on the stack
        assert (found.spills, found.stack) == (0, 0), found.name
        assert found.registers <= build.registers.get(target, 255), found.name
        assert not found.compares_and_swaps, found.name
        assert found.shared <= SHARED[target], (found.name, found.shared)
        every, wide = loads(found.hot)
        if build.wide and target in NVIDIA:
            assert wide, (found.name, found.hot)
        if build.only_wide and target in NVIDIA:
            assert wide == every, (found.name, found.hot)
        if not build.contracts:
            fused = r"F?FMA2?|DFMA|HFMA2.*|v_(?:pk_)?(?:fma|mad|fmac|mac)_f\w+"
            assert not count(found.instructions, fused), found.name
    if build.tensor_cores:
        assert any(audit(kernel).uses_tensor_cores for kernel in kernels)


class _Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a device, for which meta tensors stand."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            there = kwargs.get("device")
            leaves = there is not None and args[0].device.type != there.type
            assert not leaves or kwargs.get("non_blocking"), "a copy that waits"
        return func(*args, **kwargs)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_the_host_waits_for_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tables of constants cost once is left out."""
    make = torch.tensor

    def tensor(*args: Any, device: Any = None, **options: Any) -> Tensor:
        assert str(device) == "cpu", "made on the host, sent by a copy that waits"
        return make(*args, device=device, **options)

    def nothing(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None

    monkeypatch.setattr(KernelInterface, "__getitem__", nothing)
    monkeypatch.setattr(library, "TRITON_DEVICES", {"cuda", "cpu", "meta"})
    for device in ("cpu", "meta"):
        with torch.device(device), monkeypatch.context() as patch:
            build.launch()
            patch.setattr(torch, "tensor", tensor)
            with _Waits():
                build.launch()


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_budget_is_stated_for_every_target(build: Build) -> None:
    assert set(build.registers) == set(NVIDIA)


def test_codes_are_rounded_as_often_as_on_the_cpu() -> None:
    """Where divisions are one instruction; the code made of them multiplies and adds at once."""
    with compiled_for("sm_90") as kernels:
        BUILDS["kept: int8"].launch()
    assert "div.rn.f32" in kernels[0].asm["ptx"]
    assert "fma." not in kernels[0].asm["ptx"]


CHANGING: dict[str, Callable[[int], Any]] = {
    "draws": lambda n: displace._launch([torch.ones(99)], [torch.ones(99)], draws=[(n, 1.0)] * n),
    "draws of positions": lambda n: displace_at.displace_at(
        torch.ones(99), torch.arange(98 + n), n, 2, n, 0.5, [n] * n, [1.0] * n, "rademacher"
    ),
    "draws of rows": lambda n: displace_at.displace_rows(
        torch.ones(9, 16), torch.arange(9), n, 2, n, 0.5, [n] * n, [1.0] * n, "rademacher"
    ),
    "keys of int8": lambda n: kept.keep_int8(torch.ones(n), torch.tensor(n)),
    "keys of bfloat16": lambda n: kept.keep_bfloat16(torch.ones(n), torch.tensor(n)),
    "values restored": lambda n: kept.restore_int8(
        torch.ones(n).char(), torch.ones(1).bfloat16(), torch.float32
    ),
    "tokens and positions": lambda n: sampled.sampled_outer(
        torch.ones(n, 3), torch.ones(n, 4), *[torch.arange(n)] * 3
    ),
    "tokens of tiles": lambda n: tiles.tiled_outer(
        torch.ones(n, 70), torch.ones(n, 70), *[torch.arange(5)] * 3, 64
    ),
    "tokens of what is listed": lambda n: tiles.outer_above(
        torch.ones(n, 70), torch.ones(n, 70), torch.ones(()), torch.arange(5), 9, 64
    ),
    "bits": lambda n: select.magnitude_thresholds([torch.ones(98 + n, device="meta")], 0.5),
}


@pytest.mark.parametrize("launch", CHANGING.values(), ids=CHANGING)
def test_what_changes_from_step_to_step_compiles_nothing_anew(launch: Callable[[int], Any]) -> None:
    """Triton compiles for 1 and for multiples of 16 what is not told to it as any number."""
    with compiled_for("sm_90") as kernels:
        for n in (7, 16, 1, 2):
            launch(n)
    assert len(set(map(id, kernels))) == 1


def test_spills_are_seen() -> None:
    """The harness itself: few registers and much to hold."""
    import triton
    import triton.language as tl

    @triton.jit
    def hold(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        one = tl.load(x + at)
        tl.store(x + at, one / tl.sum(one))

    with compiled_for("sm_90") as kernels:
        hold[(1,)](torch.empty(4096), BLOCK=4096, num_warps=1, maxnreg=32)
    assert audit(kernels[0]).spills


def test_instructions_are_read() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def add(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(x + at) + 1.0)

    with compiled_for("sm_90") as kernels:
        add[(1,)](torch.empty(4096), BLOCK=1024)
    found = audit(kernels[0])
    assert loads(found.instructions) == (2, 2)
    assert 0 < found.registers < 64
    assert 0 < found.occupancy <= 1
    assert any(re.match(r"STG\..*128", name) for name in found.instructions)
