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
    """`without_gpu.py` beside this file, where Triton is installed."""
    import importlib.util
    from pathlib import Path

    pytest.importorskip("triton")
    path = Path(__file__).with_name("without_gpu.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
