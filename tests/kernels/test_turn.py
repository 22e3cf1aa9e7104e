"""Transposition: every entry in its place, in memory that is kept only as long as it may be."""

from __future__ import annotations

import pytest
import torch

from sft.kernels.cpu import turn as module
from sft.kernels.cpu.turn import turn, turned


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("n", [0, 1, 7, 64, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_entry_is_in_its_place(tokens: int, n: int, dtype: torch.dtype) -> None:
    x = torch.arange(tokens * n, dtype=dtype).view(tokens, n)
    found = turn(x)
    assert found.is_contiguous()
    assert torch.equal(found, x.t())


def test_of_a_view() -> None:
    wide = torch.arange(40.0 * 512).view(40, 512)
    for view in (wide[:, 3:200], wide[::2], wide[:, ::2], wide[3:4].expand(33, 512)):
        assert torch.equal(turn(view), view.t())


def test_a_slot_is_used_again_and_the_other_is_left() -> None:
    a, b = torch.randn(20, 30), torch.randn(20, 10)
    left, right = turned(a, "left"), turned(b, "right")
    assert torch.equal(left, a.t())
    assert torch.equal(right, b.t())
    again = turned(b, "left")
    assert again.data_ptr() == left.data_ptr()
    assert torch.equal(right, b.t())


def test_what_is_turned_already_is_not_copied() -> None:
    x = torch.randn(30, 20).t()
    assert turned(x, "left").data_ptr() == x.data_ptr()


def test_large_buffers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 100)
    x = torch.randn(20, 30)
    first, second = turned(x, "left"), turned(x, "left")
    assert first.data_ptr() != second.data_ptr()


def test_a_buffer_of_inference_mode_serves_training() -> None:
    module._kept._buffers.clear()
    with torch.inference_mode():
        turned(torch.randn(20, 30), "left")
    x = torch.randn(20, 30)
    assert torch.equal(turned(x, "left"), x.t())
