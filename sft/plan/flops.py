"""Floating point operations of what is run: torch's formulas, and those of operations of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> int:
    """Return how many an operation makes; 0 where moving its bytes takes all the time."""
    name = func._overloadpacket._qualified_op_name
    if name in _OWN:
        return int(_OWN[name](*args))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=found))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[2] * (width + value.shape[3])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    # five products of the size of two in forward
    return 5 * _attention(query, key, value) // 2


def _sampled(left: Tensor, right: Tensor, indices: Tensor, *_: Any) -> int:
    return 2 * left.shape[0] * indices.numel()


def _tiled(left: Tensor, right: Tensor, *_: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def _sparse(x: Tensor, values: Tensor, *_: Any) -> int:
    return 2 * x.shape[0] * values.numel()


_OWN: dict[str, Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "sft::sampled_outer": _sampled,
    "sft::tiled_outer": _tiled,
    "sft::delta_product": _sparse,
    "sft::compose_": lambda out, left, right, *rest: 2 * out.numel() * left.shape[0],
}
