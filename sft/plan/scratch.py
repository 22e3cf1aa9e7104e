"""What operations of ours take on a CPU besides their outputs, which a fake tensor cannot show.

Each formula follows the implementation of its name in `sft.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sft.kernels.kept import TILE
from sft.kernels.outer_at import BLOCK_BYTES

_CHUNK = 32 * TILE


def scratch(func: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes that an operation takes and gives back."""
    formula = _FORMULAS.get(str(func)) if func.namespace == "sft" else None
    return 0 if formula is None else formula(*args)


def _sampled(left: Tensor, right: Tensor, indices: Tensor, *view: Tensor) -> int:
    # the pattern's zeros, and a copy of its indices that the product makes
    pattern = 4 * indices.numel() + sum(map(_bytes, view))
    return pattern + sum(_widened(x) + _turned(x) for x in (left, right))


def _tiled(left: Tensor, right: Tensor, indices: Tensor, *_: Any) -> int:
    block = min(BLOCK_BYTES, 4 * left.shape[1] * right.shape[1])
    # the parts of the result, positions of a block, and the block
    return 4 * indices.numel() + block + _widened(left) + _widened(right)


def _product(x: Tensor, values: Tensor, indices: Tensor, *rest: Any) -> int:
    rows, cols, to_rows = rest[-3:]
    tokens = x.shape[0]
    wide = 4 * x.numel()
    result = 4 * tokens * (rows if to_rows else cols)
    # two coordinates in int64 twice over, values twice, and the sorted copy of both
    total: int = 44 * indices.numel() + wide + result
    return total


def _kept(x: Tensor, *_: Any) -> int:
    # a chunk in float32, its noise in float32 and 16 bits, and a pattern
    return 14 * min(x.numel(), _CHUNK) + 2 * TILE


def _restored(codes: Tensor, *_: Any) -> int:
    return 4 * codes.numel()


def _widened(x: Tensor) -> int:
    return 4 * x.numel() if x.element_size() < 4 else 0


def _turned(x: Tensor) -> int:
    return 0 if x.stride(0) == 1 else max(4, x.element_size()) * x.numel()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_FORMULAS: dict[str, Callable[..., int]] = {
    "sft.sampled_outer.default": _sampled,
    "sft.tiled_outer.default": _tiled,
    "sft.delta_product.default": _product,
    "sft.keep_int8.default": _kept,
    "sft.keep_bfloat16.default": _kept,
    "sft.restore_int8.default": _restored,
}
