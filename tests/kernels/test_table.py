"""The table by which one launch works on many tensors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from device_cases import adamw, positions
from without_gpu.audit import audit, loads
from without_gpu.compiler import compiled_for

from sft.kernels.triton.positions import gather_many
from sft.kernels.triton.table import BLOCK, alike, table


def test_programs_share_tensors_by_blocks() -> None:
    tensors = [torch.empty(1), torch.empty(2 * BLOCK + 1), torch.empty(BLOCK)]
    found = table([tensors], [7, 8, 9])
    assert found.blocks.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 0]]
    assert found.blocks.dtype == torch.int32
    expected = [[t.numel(), t.data_ptr(), n] for t, n in zip(tensors, (7, 8, 9), strict=True)]
    assert found.rows.tolist() == expected


def test_the_same_addresses_are_sent_once_and_others_anew() -> None:
    tensors = [torch.empty(5), torch.empty(6)]
    first, again = table([tensors]), table([tensors])
    other = table([[tensors[0], torch.empty(6)]])
    assert again.rows.data_ptr() == first.rows.data_ptr()
    assert other.rows.data_ptr() != first.rows.data_ptr()
    # sizes alone decide about the blocks
    assert other.blocks.data_ptr() == first.blocks.data_ptr()


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_what_16_bytes_do_not_divide_is_not_aligned(shift: int) -> None:
    whole = torch.empty(20)
    assert table([[torch.empty(4)], [whole[shift:][:4]]]).aligned == (shift % 4 == 0)


def test_what_a_kernel_would_walk_past_is_refused() -> None:
    """Given addresses alone, it would read and write what lies there."""
    tensors = [torch.empty(6), torch.empty(4)]
    with pytest.raises(ValueError, match=r"got \[6, 3\] entries beside \[6, 4\], allowed are as"):
        table([tensors, [torch.empty(6), torch.empty(3)]])
    strided, elsewhere = torch.empty(12)[::2], torch.empty(6, device="meta")
    for wrong, found in ((strided, r"\(2,\) on cpu"), (elsewhere, r"\(1,\) on meta")):
        for columns in ([[tensors[0]], [wrong]], None), ([[tensors[0]]], [wrong]):
            streamed, others = columns
            with pytest.raises(ValueError, match=f"got strides {found}, allowed are contiguous"):
                table(streamed, *([others] if others else []))


def test_unaligned_tensors_are_not_read_by_128_bits() -> None:
    indices = positions.supports(torch.int32)
    with compiled_for("sm_90") as kernels:
        gather_many(positions.weights(torch.bfloat16), positions.shifted(indices))
        gather_many(positions.weights(torch.bfloat16), indices)
    wide = [loads(audit(kernel).instructions)[1] for kernel in kernels]
    assert wide == [0, 2]


def test_rows_of_one_kind_come_together_and_empty_ones_not_at_all() -> None:
    values = [torch.empty(3), torch.empty(0), torch.empty(2).half(), torch.empty(4)]
    indices = [torch.empty(v.numel(), dtype=torch.int32) for v in values]
    groups = list(alike(values, [], indices))
    assert [[t.numel() for t in group[0]] for group in groups] == [[3, 4], [2]]
    assert [group[1] for group in groups] == [[], []]
    assert list(alike([], [])) == []


def test_writing_in_the_same_pass_moves_fewer_bytes() -> None:
    """The update alone and then a write of its own read the values once more."""
    from without_gpu.interpreter import interpreted
    from without_gpu.traffic import measured

    from sft.kernels.triton.adamw import sparse_adamw_
    from sft.kernels.triton.positions import write_many_

    def made() -> tuple[object, ...]:
        return adamw._make(torch.bfloat16, housed=True)

    with interpreted(), measured() as together:
        sparse_adamw_(*made())
    with interpreted(), measured() as apart:
        *update, weights, indices, originals, reference = made()
        sparse_adamw_(*update, [], [], [], reference)
        write_many_(weights, indices, update[0], originals, reference)
    count = sum(k for *_, k in positions.SIZES)
    assert together.useful["store"] == apart.useful["store"]
    # and the entries of the table, of 8 programs
    assert apart.useful["load"] - together.useful["load"] >= 4 * count


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_positions_past_32_bits(index: torch.dtype) -> None:
    """By arithmetic: addresses far below what there is, and positions that lead back to it."""
    from without_gpu.interpreter import interpreted

    import sft.kernels.triton.positions as launchers
    from sft.kernels.triton.table import TYPES

    far = 2**31 - 50 if index == torch.int32 else 2**33
    first = 2**22 + 1  # this block begins past 2^32
    weight, at = torch.arange(50, dtype=torch.int64), torch.tensor([0, 3, 49]).add(far).to(index)
    out = torch.zeros(3, dtype=torch.int64)
    start = first * BLOCK
    rows = [
        start + 3,
        at.data_ptr() - start * at.element_size(),
        out.data_ptr() - start * 8,
        weight.data_ptr() - far * 8,
    ]
    with interpreted():
        launchers.gather_kernel[(1,)](
            torch.tensor([rows]),
            torch.tensor([[0, first]], dtype=torch.int32),
            INDEX=TYPES[index],
            WEIGHT=TYPES[torch.int64],
            ALIGNED=False,
            BLOCK=BLOCK,
        )
    assert out.tolist() == [0, 3, 49]
