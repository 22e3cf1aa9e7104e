"""What a file of cases says about a module of GPU kernels.

Each `device_cases/<module>.py` describes `kernels/triton/<module>.py` in up to three dicts: `CASES`
(values), `BUILDS` (compiled code) and `SAMPLES` (arguments of each op, for opcheck and tracing).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
_DENSE = torch.contiguous_format


@dataclass(frozen=True)
class Case:
    """One call of a launcher, and what it must give.

    Args:
        make: from a dtype to arguments: tensors of the CPU, lists of them, and plain values. The
            same ones at each call.
        run: calls the launcher, on tensors of whichever device, and returns its result.
        expected: what the result must be, from tensors of the CPU, by an oracle.
        dtypes: each is a test.
        tolerance: from a dtype to (relative, absolute); None: bit for bit.
        mutates: which arguments are written to; they are compared as well.
        stores_once: each address is stored to at most once.
    """

    make: Callable[[torch.dtype], Sequence[Any]]
    run: Callable[..., Any]
    expected: Callable[..., Any]
    dtypes: Sequence[torch.dtype] = FLOATS
    tolerance: Callable[[torch.dtype], tuple[float, float]] | None = None
    mutates: Sequence[int] = ()
    stores_once: bool = True


@dataclass(frozen=True)
class Build:
    """One launch at a size of production, and the laws of its compiled code.

    Args:
        launch: calls the launcher; nothing runs, so tensors may be torch.empty or meta tensors.
        registers: the most a thread may take, by target (of NVIDIA).
        wide: 128-bit loads are among the hot ones; with `only_wide`, they are all of them.
        only_wide: see `wide`.
        tensor_cores: products are made by tensor cores, on each target.
        contracts: multiplications and additions may be fused; where bits must be those of the CPU
            they may not.
        launches: kernels that the launcher starts.
    """

    launch: Callable[[], Any]
    registers: Mapping[str, int] = field(default_factory=dict)
    wide: bool = True
    only_wide: bool = False
    tensor_cores: bool = False
    contracts: bool = True
    launches: int = 1


def modules() -> list[str]:
    """Return the names of all files of cases."""
    here = Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if p.stem != Path(__file__).stem)


def collected(kind: str) -> dict[str, Any]:
    """Return all `CASES`, `BUILDS` or `SAMPLES`, as "module: name"; samples by the op's name."""
    found: dict[str, Any] = {}
    for module in modules():
        entries = getattr(importlib.import_module(f"device_cases.{module}"), kind, {})
        found |= {n if kind == "SAMPLES" else f"{module}: {n}": e for n, e in entries.items()}
    return found


def moved(arguments: Any, device: torch.device | str) -> Any:
    """Copy the tensors of (nested) arguments to a device, their strides and offsets kept."""
    if isinstance(arguments, Tensor):
        sizes, strides, offset = arguments.size(), arguments.stride(), arguments.storage_offset()
        span = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
        held = torch.empty(
            offset + (span if arguments.numel() else 0), dtype=arguments.dtype, device=device
        )
        # an offset of 1 leaves an address that 16 bytes do not divide
        return held.as_strided(sizes, strides, offset).copy_(arguments)
    if isinstance(arguments, (list, tuple)):
        parts = [moved(value, device) for value in arguments]
        return type(arguments)(*parts) if hasattr(arguments, "_fields") else type(arguments)(parts)
    return arguments


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of (nested) arguments or results, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for value in result for tensor in tensors(value)]
    return []


def check(case: Case, dtype: torch.dtype, device: torch.device | str) -> None:
    """Run a case on a device and compare: results, what is written to, and what must not be."""
    given, wanted_from = moved(tuple(case.make(dtype)), device), tuple(case.make(dtype))
    found = case.run(*given)
    wanted = case.expected(*wanted_from)
    _compare(tensors(found), tensors(wanted), case, dtype)
    for place, (left, right) in enumerate(zip(given, wanted_from, strict=True)):
        if place in case.mutates:
            _compare(tensors(left), tensors(right), case, dtype)
        else:
            untouched = tensors(case.make(dtype)[place])
            assert all(map(_same, tensors(left), untouched)), f"argument {place} was written to"


def _compare(found: list[Tensor], wanted: list[Tensor], case: Case, dtype: torch.dtype) -> None:
    assert len(found) == len(wanted)
    for left, right in zip(found, wanted, strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        if case.tolerance is None:
            assert _same(left, right), f"{left} is not {right}"
        else:
            relative, absolute = case.tolerance(dtype)
            torch.testing.assert_close(left.cpu(), right.cpu(), rtol=relative, atol=absolute)


def _same(left: Tensor, right: Tensor) -> bool:
    """Compare bits: NaN equals itself, 0.0 and -0.0 differ."""
    a, b = (t.detach().cpu().flatten().clone(memory_format=_DENSE) for t in (left, right))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
