"""Adapters of shapes alone, for a model that is planned and not trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_ALONE = ContextVar("_ALONE", default=False)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Let adapters that are made in the block go to the meta device, whatever asks for them.

    `get_peft_model` does not pass `low_cpu_mem_usage` on to a tuner.
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def on_meta(arguments: Mapping[str, Any]) -> bool:
    """Tell whether the arguments of `inject_adapter`, or a block around it, ask for shapes."""
    return bool(arguments.get("low_cpu_mem_usage", False)) or _ALONE.get()


def has_content(tensor: Tensor) -> bool:
    """Tell whether a tensor is more than a shape: neither of the meta device nor a fake one."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
