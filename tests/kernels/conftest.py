from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@pytest.fixture
def make_pattern() -> Callable[..., Any]:
    """Build a pattern of k random positions; the same ones for the same arguments."""

    def build(rows: int, cols: int, k: int, dtype: Any = None) -> Any:
        import torch

        from sft.kernels.pattern import Pattern

        generator = torch.Generator().manual_seed(rows * 1009 + cols * 31 + k)
        indices = torch.randperm(rows * cols, generator=generator)[:k].sort().values
        return Pattern(indices.to(dtype or torch.int32), (rows, cols))

    return build


@pytest.fixture
def make_site() -> Callable[..., Any]:
    """Build what a layer tells backward: a pattern, a tap and a stamp that tests may change."""

    @dataclass
    class Spot:
        pattern: Any
        tap: Any = None
        stamp: object = 0

    return Spot


@pytest.fixture(scope="session")
def without_gpu() -> Any:
    """Triton's kernels, interpreted here or compiled for GPUs that are not here."""
    from types import SimpleNamespace

    pytest.importorskip("triton")
    from without_gpu.compiler import TARGETS, compiled_for
    from without_gpu.interpreter import interpreted

    return SimpleNamespace(
        TARGETS={name: name for name in TARGETS}, compiled_for=compiled_for, interpreted=interpreted
    )
