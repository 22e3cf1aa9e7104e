"""Every GPU kernel against its oracle, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from device_cases.base import Case, check, collected, modules, moved, tensors
from without_gpu.interpreter import interpreted
from without_gpu.traffic import Traffic, measured

CASES: dict[str, Case] = collected("CASES")
RUNS = [
    pytest.param(case, dtype, id=f"{name}, {str(dtype).removeprefix('torch.')}")
    for name, case in CASES.items()
    for dtype in case.dtypes
]


class _Allocations(TorchDispatchMode):
    """Lets kernels touch every tensor that an op returns while it is on."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic, self._kept = traffic, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        # kept: what is freed could be given to another, out of whose bounds one would not fall
        self._kept += tensors(found)
        self._traffic.allow(*tensors(found))
        return found


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what is allocated and not initialised with NaN."""
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_values(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    """Right, within bounds, nothing read that was not written, nothing stored twice."""
    with interpreted(), measured() as traffic, _Allocations(traffic):
        check(case, dtype, "cpu")
    assert not (case.stores_once and traffic.stored_twice())


def test_the_poison_works(poisoned: None) -> None:
    assert torch.empty(3).isnan().all()


def test_every_module_of_kernels_has_cases() -> None:
    from pathlib import Path

    folder = Path(__file__).resolve().parents[2] / "kernels/triton"
    launching = {f.stem for f in folder.glob("*.py") if "_kernel" in f.read_text("utf-8")}
    described = {name.partition(":")[0] for name in CASES}
    assert described == set(modules())
    assert launching <= described


def test_a_stray_store_is_caught() -> None:
    """The harness itself: a kernel one entry past the end."""
    import triton
    import triton.language as tl

    @triton.jit
    def fill(out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        tl.store(out + at, at, mask=at <= n)

    out = torch.zeros(5, dtype=torch.int32)
    with (
        interpreted(),
        measured(out),
        pytest.raises(Exception, match="store: 1 of 6 lanes out of bounds"),
    ):
        fill[(1,)](out, 5, BLOCK=8)


def test_a_double_store_is_caught() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def fill(out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(out + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK))

    out = torch.zeros(4, dtype=torch.int32)
    with interpreted(), measured(out) as traffic:
        fill[(1,)](out, BLOCK=8)
    assert traffic.stored_twice() == 4


def test_a_tensor_that_must_stay_is_watched() -> None:
    case = Case(
        make=lambda dtype: (torch.ones(3, dtype=dtype),),
        run=lambda tensor: tensor.add_(1),
        expected=lambda tensor: tensor + 1,
    )
    with pytest.raises(AssertionError, match="argument 0 was written to"):
        check(case, torch.float32, "cpu")


def test_what_is_moved_lies_as_it_did() -> None:
    """A case of unaligned tensors would else be one of aligned ones."""
    whole = torch.arange(24.0).view(4, 6)
    for tensor in (whole[1:, 1::2].t(), whole.flatten()[1:], whole[:0], torch.tensor(3.0)):
        there = moved([tensor], "cpu")[0]
        assert torch.equal(there, tensor)
        assert there.stride() == tensor.stride()
        assert there.storage_offset() == tensor.storage_offset()
        assert there.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_arithmetic_on_bfloat16_is_refused() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def double(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(x + at) + tl.load(x + at))

    with interpreted(), pytest.raises(Exception, match="add of bfloat16 values"):
        double[(1,)](torch.ones(4, dtype=torch.bfloat16), BLOCK=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_halves_are_summed_in_float32(dtype: torch.dtype) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def product(a, b, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))

    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    a, b, out = a.to(dtype), b.to(dtype), torch.empty(32, 32)
    with interpreted():
        product[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, _product(a, b), rtol=1e-6, atol=1e-5)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).float()
