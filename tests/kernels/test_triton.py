"""The GPU's kernels against the CPU's, bit for bit: interpreted here, and on a GPU where one is."""

from __future__ import annotations

import collections
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sft.kernels.cpu.displace import Item
from sft.kernels.displace import Magnitude, Mask, Random, displace
from sft.kernels.noise import KINDS, TILE, noise, normal_table

pytest.importorskip("triton")

EXACT = ["rademacher", "gaussian_table"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MASKS: dict[str, Mask | None] = {
    "all": None,
    "small": Magnitude(0.1),
    "random": Random(2**63 + 9, 0.3),
}
DRAWS = [(5, 1e-2), (2**63 + 6, -0.3), (8, 0.0), (2**64 - 1, 2.0)]
PARAMETER = 2**32 - 7


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], name="place")
def _place(request: pytest.FixtureRequest, without_gpu: Any) -> Iterator[torch.device]:
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield torch.device("cuda")
    else:
        with without_gpu.interpreted():
            yield torch.device("cpu")


def moved(
    place: torch.device,
    weights: list[Tensor],
    draws: list[tuple[int, float]],
    *,
    kind: str = "rademacher",
    decay: float = 0.0,
    mask: Mask | None = None,
    in_place: bool = False,
) -> list[Tensor]:
    """What `displace` does with tensors that are on a GPU; past its dispatch, which asks where."""
    from sft.kernels.triton.displace import displace_on_device

    there = [w.to(place, copy=True) for w in weights]
    out = there if in_place else [torch.full_like(w, torch.nan) for w in there]
    pairs = zip(there, out, strict=True)
    items = [Item(w, o, PARAMETER - i, decay, mask) for i, (w, o) in enumerate(pairs)]
    displace_on_device(items, draws, kind)
    return [o.cpu() for o in out]


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """Of odd lengths, of one weight, of whole tiles, transposed, empty; with both zeros."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 1667), (), (2 * TILE,), (77, 60), (0, 4)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[0][0, :4] = torch.tensor([0.0, -0.0, 0.1, -0.1])
    made[3] = made[3].t()
    return made


def same(left: Tensor, right: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    bits = [t.contiguous().view(-1).view(integers) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
def test_the_bits_are_those_of_the_cpu(
    place: torch.device, kind: str, dtype: torch.dtype, mask: Mask | None, in_place: bool
) -> None:
    weights, count = tensors(dtype), len(tensors(dtype))
    parameters = [PARAMETER - i for i in range(count)]
    options = {"kind": kind, "decays": [0.1] * count, "masks": [mask] * count}
    expected = displace(weights, parameters, DRAWS, **options)
    found = moved(place, weights, DRAWS, kind=kind, decay=0.1, mask=mask, in_place=in_place)
    assert all(map(same, found, expected))


@pytest.mark.parametrize("draws", [[], [(5, 0.0)], [(5, 1e-3)]], ids=["none", "of 0", "one"])
@pytest.mark.parametrize("decay", [0.0, 0.3], ids=["", "decay"])
def test_few_draws(place: torch.device, draws: list[tuple[int, float]], decay: float) -> None:
    for dtype in DTYPES:
        weight = tensors(dtype)[0]
        expected = displace([weight], [PARAMETER], draws, decays=[decay])
        assert same(moved(place, [weight], draws, decay=decay)[0], expected[0])


def test_what_the_mask_keeps_keeps_its_bits(place: torch.device) -> None:
    """M1: not even a NaN is rewritten."""
    weight = torch.full((TILE,), 0x7F85, dtype=torch.int16).view(torch.bfloat16)
    with np.errstate(invalid="ignore"):
        assert same(moved(place, [weight], DRAWS, mask=Magnitude(1.0))[0], weight)


def test_magnitudes_at_the_threshold_are_chosen(place: torch.device) -> None:
    """M2: 0.1 lies between two numbers of each dtype."""
    for dtype in DTYPES:
        eps = torch.finfo(dtype).eps
        near = (0.1 * (1 + eps * torch.arange(-2, 3).double())).to(dtype)
        near = torch.cat([near, -near])
        chosen = near.double().abs() <= 0.1
        assert 0 < chosen.sum() < len(near)
        found = moved(place, [near], [(1, 1.0)], mask=Magnitude(0.1))[0]
        assert torch.equal(found != near, chosen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 1, 4095, 10_001, 2**31 - 5, 2**43 + 3])
def test_noise_is_that_of_the_cpu(place: torch.device, kind: str, start: int) -> None:
    """Z6: of any part, also where indices and counters pass 32 bits."""
    from sft.kernels.triton.displace import noise_on_device

    found = noise_on_device(2**63 + 5, PARAMETER, 5003, kind, start, place).cpu()
    expected = noise(2**63 + 5, PARAMETER, 5003, kind=kind, start=start)
    if kind in EXACT:
        assert same(found, expected)
    # logarithm, sine and cosine are each library's own
    assert (found - expected).abs().max() < (2e-6 if place.type == "cpu" else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_normals_by_box_muller_are_close(place: torch.device, dtype: torch.dtype) -> None:
    weight = tensors(dtype)[0]
    expected = displace([weight], [PARAMETER], DRAWS, kind="gaussian", decays=[0.1])
    found = moved(place, [weight], DRAWS, kind="gaussian", decay=0.1)
    as_precise = torch.float32 if dtype == torch.float64 else dtype
    torch.testing.assert_close(found[0].to(as_precise), expected[0].to(as_precise))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_on_a_gpu_come_here() -> None:
    weight = tensors(torch.bfloat16)[0]
    found = displace([weight.cuda()], [1], DRAWS, masks=[Random(3, 0.5)])[0]
    assert found.is_cuda
    assert same(found.cpu(), displace([weight], [1], DRAWS, masks=[Random(3, 0.5)])[0])
    assert same(noise(1, 2, 99, kind=KINDS[0], device="cuda").cpu(), noise(1, 2, 99, kind=KINDS[0]))


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sft.kernels.triton.kernel", None)
    with pytest.raises(ImportError, match=r"triton: not installed, .* pip install 'sparse-sft"):
        moved(torch.device("cpu"), [torch.ones(3)], DRAWS)


def test_the_table_is_exact_in_half_the_bytes() -> None:
    assert torch.equal(normal_table().to(torch.bfloat16).float(), normal_table())


@pytest.fixture
def compiled(
    without_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Compile the kernel for a GPU that need not be here."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def build(target: str, kind: str, dtype: torch.dtype) -> Any:
        with without_gpu.compiled_for(without_gpu.TARGETS[target]) as kernels:
            moved(
                torch.device("cpu"),
                [torch.empty(2**16, dtype=dtype)],
                DRAWS,
                kind=kind,
                decay=0.1,
                mask=Random(3, 0.5),
                in_place=True,
            )
        (kernel,) = kernels
        return kernel

    return build


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_it_compiles_for_nvidia(compiled: Callable[..., Any], target: str, kind: str) -> None:
    """All stays in registers, memory moves by 128 bits, nothing is contracted where bits count."""
    import triton

    kernel = compiled(target, kind, torch.bfloat16)
    assert "ld.global.v4" in kernel.asm["ptx"]
    assert "st.global.v4" in kernel.asm["ptx"]
    cubin = triton.knobs.cache.dir + "/kernel.cubin"
    Path(cubin).write_bytes(kernel.asm["cubin"])
    dump = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.check_output([dump, "--dump-resource-usage", cubin], text=True)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    assert (used["STACK"], used["LOCAL"]) == ("0", "0")
    assert int(used["REG"]) <= 128
    steps = subprocess.check_output([triton.knobs.nvidia.nvdisasm.path, "-c", cubin], text=True)
    names = collections.Counter(re.findall(r"\b(FFMA|FFMA2|DFMA|LDL|STL|FADD|FADD2)\b", steps))
    assert not names["LDL"] + names["STL"]
    assert names["FADD"] + names["FADD2"]
    if kind in EXACT:
        assert not names["FFMA"] + names["FFMA2"] + names["DFMA"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_for_amd(compiled: Callable[..., Any], kind: str) -> None:
    code = compiled("gfx942", kind, torch.bfloat16).asm["amdgcn"]
    for what in (r"\.vgpr_spill_count", r"\.sgpr_spill_count", r"\.private_segment_fixed_size"):
        assert re.findall(rf"{what}:\s+(\d+)", code) == ["0"]
    if kind in EXACT:
        assert not re.findall(r"\bv_(?:pk_)?(?:fma|mad|fmac|mac)_f\w+", code)


def test_double_precision_stays_in_registers(compiled: Callable[..., Any]) -> None:
    code = compiled("gfx942", "gaussian", torch.float64).asm["amdgcn"]
    assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", code) == ["0"]
