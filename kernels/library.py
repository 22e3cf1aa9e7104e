"""How an op is registered with torch, and which of its implementations runs.

An op is a schema, a plain torch implementation that is right on every device and fast on the CPU,
a Triton launcher that is imported when it is first called, and a fake that gives shapes to tracers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

VARIABLE = "SFT_KERNELS"
CHOICES = ("auto", "torch", "triton")
# Triton's interpreter runs kernels on tensors of the CPU; without it they are for GPUs alone.
TRITON_DEVICES = {"cuda", "cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else {"cuda"}

# every op by its name: opcheck and the tests of tracing run over all of them
OPS: dict[str, torch._ops.OpOverload] = {}
LAUNCHERS: dict[str, str] = {}

_library = torch.library.Library("sft", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(
    schema: str, *, plain: Callable[..., Any], triton: str, fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Register an op as `torch.ops.sft.<name>` and return it.

    A tracer (torch.compile, export) keeps the op as it is, whichever implementation runs.

    Args:
        schema: in torch's language, such as "gather(Tensor weight, Tensor indices) -> Tensor".
        plain: the implementation in torch.
        triton: "module:function" under `sft.kernels.triton`, a launcher of the same signature.
        fake: returns tensors of the right shapes, dtypes and devices.
    """
    name = schema.partition("(")[0]

    def run(*args: Any, **kwargs: Any) -> Any:
        if implementation(_device((*args, *kwargs.values()))) != "triton":
            return plain(*args, **kwargs)
        found = launcher(triton)(*args, **kwargs)
        # operations of torch raise versions by themselves, kernels do not
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for tensor in _tensors(given[name] for name in written):
            if not tensor.is_inference():
                increment_version(tensor)
        return found

    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    arguments = getattr(torch.ops.sft, name).default._schema.arguments
    names = [argument.name for argument in arguments]
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sft::{name}", fake, lib=_library)
    OPS[name], LAUNCHERS[name] = getattr(torch.ops.sft, name).default, triton
    return OPS[name]


def implementation(device: torch.device) -> str:
    """Return "torch" or "triton": what runs on this device by the variable SFT_KERNELS.

    "auto", the default, takes Triton on GPUs where it is installed. The choice never depends on a
    timing, so that a resumed run takes the same path.

    Raises:
        ValueError: the variable has another value, or asks for Triton by name where it is not
            installed or does not serve the device.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE}: got {wanted!r}, allowed is one of {', '.join(CHOICES)}")
    if wanted == "torch" or (wanted == "auto" and device.type not in TRITON_DEVICES):
        return "torch"
    if wanted == "auto":
        return "triton" if _installed() else "torch"
    if device.type not in TRITON_DEVICES:
        raise ValueError(
            f"{VARIABLE}: got 'triton', the tensors are on {device}, allowed are GPUs; "
            "unset it, or set TRITON_INTERPRET=1 to debug kernels on the CPU"
        )
    if not _installed():
        raise ValueError(
            f"{VARIABLE}: got 'triton', which is not installed; pip install 'sparse-sft[triton]' "
            "on Linux, or unset it"
        )
    return "triton"


@functools.cache
def launcher(where: str) -> Callable[..., Any]:
    """Import "module:function" from `sft.kernels.triton`.

    Raises:
        ImportError: Triton is not installed.
    """
    module, _, function = where.partition(":")
    if not _installed():
        raise ImportError(
            "triton: not installed, and this operation on a GPU needs it; "
            "pip install 'sparse-sft[triton]' on Linux, or train on the CPU"
        )
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"sft.kernels.triton.{module}"), function
    )
    return found


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _device(args: Iterable[Any]) -> torch.device:
    """Return the device of the first tensor among arguments and lists of them."""
    return next((tensor.device for tensor in _tensors(args)), torch.device("cpu"))


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments and lists of them."""
    for arg in args:
        for value in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(value, Tensor):
                yield value
