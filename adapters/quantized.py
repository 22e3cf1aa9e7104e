"""Weights that bitsandbytes keeps in 4 or 8 bits: what they stand for, and that they stay it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_EIGHT, _FOUR = "Int8Params", "Params4bit"


def packing(module: nn.Module) -> str | None:
    """Return how a module's weight is packed, "nf4", "fp4" or "int8"; None if it is not.

    By the name of the weight's class, as PEFT tells it: bitsandbytes takes seconds to import.
    """
    weight: Any = module._parameters.get("weight")  # not an adapter layer's, which shows its base's
    kind = type(weight).__name__
    if kind == _FOUR:
        return str(weight.quant_type)
    return "int8" if kind == _EIGHT else None


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model whose weights are packed, with their names."""
    return ((name, m) for name, m in model.named_modules() if packing(m) is not None)


def dequantised(module: nn.Module) -> Tensor:
    """Return what a packed weight stands for: (out, in) float32, not rounded to its former dtype.

    4 bits: code[c] absmax(block). int8: c absmax(row) / 127.

    Args:
        module: of bitsandbytes, with a packed weight.
    """
    from bitsandbytes import functional

    packed: Any = module.weight
    if packing(module) == "int8":
        fresh = getattr(packed, "SCB", None)  # moves to the module's state in its first forward
        scales = module.state.SCB if fresh is None else fresh  # type: ignore[union-attr]
        whole: Tensor = functional.int8_vectorwise_dequant(packed.data, scales.to(packed.device))
        return whole.float()
    wide = copy.copy(packed.quant_state)
    wide.dtype = torch.float32
    found: Tensor = functional.dequantize_4bit(packed.data, wide)
    return found


def requantised(module: nn.Module, weight: Tensor) -> nn.Parameter:
    """Return a weight packed as a module's is.

    Args:
        module: of bitsandbytes, with a packed weight.
        weight: (out, in).
    """
    import bitsandbytes

    old: Any = module.weight
    if packing(module) == "int8":
        # bitsandbytes quantises from float16: what float16 cannot hold would be infinite
        half = weight.clamp(*(torch.finfo(torch.float16).min, torch.finfo(torch.float16).max))
        fresh = bitsandbytes.nn.Int8Params(half.cpu(), requires_grad=False)
        packed: nn.Parameter = fresh.to(old.device)
        return packed
    state = old.quant_state
    fresh = bitsandbytes.nn.Params4bit(
        weight.to(state.dtype).cpu(),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=old.quant_storage,
    )
    packed = fresh.to(old.device)
    return packed


def check_unpacks(model: nn.Module) -> None:
    """Raise on weights that bitsandbytes packs well and unpacks wrongly.

    On a CPU its 4-bit kernels begin a block with each row; it packs in blocks that run on.

    Raises:
        ValueError: rows are no multiple of a block.
    """
    for name, module in packed_modules(model):
        weight: Any = module.weight
        state = getattr(weight, "quant_state", None)
        if state is None or weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
            continue
        raise ValueError(
            f"quantization: got {packing(module)} for {name!r}, whose rows of {state.shape[-1]} "
            f"weights are no multiple of {state.blocksize}: bitsandbytes unpacks those wrongly on "
            f"a CPU; leave it out with skip_modules=[{name.rpartition('.')[2]!r}], or take int8"
        )


def keep_packed(model: nn.Module) -> None:
    """Let bitsandbytes leave the bytes of 4-bit weights alone.

    On CPUs with bf16 instructions its first forward pass in eval mode repacks a weight for a kernel
    without a backward, and rounds its scales to bfloat16: an evaluation before or amid training
    would end the gradient there, silently, and change the model. The switch for it is a module's.
    """
    changed = 0
    for _, module in packed_modules(model):
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            module.state_dict()  # bitsandbytes unpacks what it saves, and leaves it so
            changed += 1
    if changed:
        logger.warning(
            "%d 4-bit weights were evaluated before: bitsandbytes rounded their scales to bfloat16;"
            " load the model with sft, or put the adapter on before the first forward pass, and "
            "they stay what was loaded",
            changed,
        )
