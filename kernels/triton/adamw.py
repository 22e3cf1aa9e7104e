"""`sparse_adamw_` on a GPU: values, state and weights of all tensors in one launch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.bias_scales import bias_tables
from sft.kernels.sparse_adamw import in_buckets_
from sft.kernels.triton.soft_threshold import shrunk
from sft.kernels.triton.table import BLOCK, TYPES, address, alike, place, table


def sparse_adamw_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ages: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    reference: bool,
    taus: Sequence[float],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    reference_sums: bool,
) -> None:
    """Launch `sft.kernels.sparse_adamw.sparse_adamw_`.

    What the kernel does not take goes the way of torch: float64, strides, betas next to 1.
    """
    columns = [values, grads, exp_avgs, exp_avg_sqs, ages, weights, indices, originals]
    options = (lr, beta1, beta2, eps, weight_decay, reference)
    for fit, chosen in _parted(columns[:5], max(beta1, beta2)):
        some = [[column[i] for i in chosen] if column else [] for column in columns]
        bounds = [taus[i] for i in chosen] if taus else []
        run: Callable[..., None] = _launch if fit else in_buckets_
        run(*some[:5], *options, bounds, *some[5:], reference_sums)


def _parted(columns: Sequence[Sequence[Tensor]], beta: float) -> list[tuple[bool, list[int]]]:
    """Return the rows that the kernel takes and those that it does not."""
    parts: dict[bool, list[int]] = {}
    tables = bias_tables((beta, beta), False, columns[0][0].device) is not None
    for i, row in enumerate(zip(*columns, strict=True)):
        fit = row[0].dtype != torch.float64 and all(tensor.is_contiguous() for tensor in row)
        parts.setdefault(tables and fit, []).append(i)
    return list(parts.items())


def _launch(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ages: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    reference: bool,
    taus: Sequence[float],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    reference_sums: bool,
) -> None:
    bounds = [torch.tensor(tau, dtype=torch.float64, device="cpu") for tau in taus]
    columns = (values, grads, exp_avgs, exp_avg_sqs, ages, indices, originals, weights)
    for *streams, of, tau in alike(*columns, bounds):
        streamed = [column for column in streams if column]
        bits = [[_bits(bound.item()) for bound in tau]] if tau else []
        rows = table(streamed, *([of] if of else []), *bits)
        first = streamed[0][0]
        tables = bias_tables((beta1, beta2), reference, first.device)
        assert tables is not None
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            adamw_kernel[(len(rows.blocks),)](
                rows.rows,
                rows.blocks,
                *tables,
                len(tables[0]) - 1,
                # differences are taken here, in double precision
                -lr,
                1 - lr * weight_decay,
                1 - beta1,
                beta1,
                beta2,
                1 - beta2,
                eps,
                COLUMNS=rows.rows.shape[1],
                VALUE=TYPES[first.dtype],
                GRAD=TYPES[streamed[1][0].dtype],
                INDEX=TYPES[streamed[5][0].dtype] if of else None,
                WEIGHT=TYPES[of[0].dtype] if of else None,
                SHRINKS=bool(tau),
                # as torch.lerp: from the nearer end
                NEAR=1 - beta1 < 0.5,
                REFERENCE=reference,
                REFERENCE_SUMS=reference_sums,
                ALIGNED=rows.aligned,
                BLOCK=BLOCK,
                # 4 entries a thread: 8 would take more registers than there are
                num_warps=8,
            )


def _bits(number: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


@triton.jit(do_not_specialize=["last"])
def adamw_kernel(
    rows_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    m_scales_ptr: tl.tensor,
    root_scales_ptr: tl.tensor,
    last: tl.int32,
    minus_lr: tl.float32,
    shrink: tl.float32,
    mix1: tl.float32,
    beta1: tl.float32,
    beta2: tl.float32,
    mix2: tl.float32,
    eps: tl.float32,
    COLUMNS: tl.constexpr,
    VALUE: tl.constexpr,
    GRAD: tl.constexpr,
    INDEX: tl.constexpr,
    WEIGHT: tl.constexpr,
    SHRINKS: tl.constexpr,
    NEAR: tl.constexpr,
    REFERENCE: tl.constexpr,
    REFERENCE_SUMS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update one block of one tensor a program, and write the weight that its values live in.

    A row of the table: entries, values, gradients, m, v, ages; with a weight, positions, originals
    and the weight; with a threshold, its bits.
    """
    row, start, size = place(rows_ptr, blocks_ptr, COLUMNS, BLOCK)
    inside = tl.arange(0, BLOCK)
    # only the last block takes a mask, which would break 128-bit loads
    if start + BLOCK <= size:
        _update(
            row,
            start + inside,
            None,
            m_scales_ptr,
            root_scales_ptr,
            last,
            minus_lr,
            shrink,
            mix1,
            beta1,
            beta2,
            mix2,
            eps,
            COLUMNS,
            VALUE,
            GRAD,
            INDEX,
            WEIGHT,
            SHRINKS,
            NEAR,
            REFERENCE,
            REFERENCE_SUMS,
            ALIGNED,
        )
    else:
        here = inside < size - start
        _update(
            row,
            start + inside,
            here,
            m_scales_ptr,
            root_scales_ptr,
            last,
            minus_lr,
            shrink,
            mix1,
            beta1,
            beta2,
            mix2,
            eps,
            COLUMNS,
            VALUE,
            GRAD,
            INDEX,
            WEIGHT,
            SHRINKS,
            NEAR,
            REFERENCE,
            REFERENCE_SUMS,
            ALIGNED,
        )


@triton.jit
def _update(
    row: tl.tensor,
    at: tl.tensor,
    here: tl.tensor,
    m_scales_ptr: tl.tensor,
    root_scales_ptr: tl.tensor,
    last: tl.int32,
    minus_lr: tl.float32,
    shrink: tl.float32,
    mix1: tl.float32,
    beta1: tl.float32,
    beta2: tl.float32,
    mix2: tl.float32,
    eps: tl.float32,
    COLUMNS: tl.constexpr,
    VALUE: tl.constexpr,
    GRAD: tl.constexpr,
    INDEX: tl.constexpr,
    WEIGHT: tl.constexpr,
    SHRINKS: tl.constexpr,
    NEAR: tl.constexpr,
    REFERENCE: tl.constexpr,
    REFERENCE_SUMS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    value_ptr = address(row, 1, VALUE, ALIGNED) + at
    m_ptr = address(row, 3, tl.float32, ALIGNED) + at
    v_ptr = address(row, 4, tl.float32, ALIGNED) + at
    age_ptr = address(row, 5, tl.int32, ALIGNED) + at
    if WEIGHT is not None:
        position = tl.load(address(row, 6, INDEX, ALIGNED) + at, mask=here)
        original = tl.load(address(row, 7, WEIGHT, ALIGNED) + at, mask=here).to(tl.float32)
    g = tl.load(address(row, 2, GRAD, ALIGNED) + at, mask=here).to(tl.float32)
    m = tl.load(m_ptr, mask=here)
    v = tl.load(v_ptr, mask=here)
    age = tl.load(age_ptr, mask=here) + 1
    x = tl.load(value_ptr, mask=here).to(tl.float32)
    m = m + mix1 * (g - m) if NEAR else g - (g - m) * beta1
    v = v * beta2 + mix2 * g * g
    settled = tl.minimum(age, last)
    m_scale = tl.load(m_scales_ptr + settled, mask=here)
    root_scale = tl.load(root_scales_ptr + settled, mask=here)
    step = m * m_scale / (tl.sqrt(v) * root_scale + eps)
    x = (x + minus_lr * step) * shrink if REFERENCE else x * shrink + minus_lr * step
    new = x.to(VALUE)
    if SHRINKS:
        tau = tl.load(row + COLUMNS - 1).to(tl.int32).to(tl.float32, bitcast=True)
        new = shrunk(new, tau)
    tl.store(m_ptr, m, mask=here)
    tl.store(v_ptr, v, mask=here)
    tl.store(age_ptr, age, mask=here)
    tl.store(value_ptr, new, mask=here)
    if WEIGHT is not None:
        delta = new.to(WEIGHT).to(tl.float32) if REFERENCE_SUMS else new.to(tl.float32)
        weight_ptr = address(row, 8, WEIGHT, False)
        tl.store(weight_ptr + position, (original + delta).to(WEIGHT), mask=here)
