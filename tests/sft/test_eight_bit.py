"""The bound on 8-bit state is read out of `optim_args`, however it is written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sft.eight_bit import set_min_8bit_size


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        (None, 4096),
        ("", 4096),
        ("betas=0.9", 4096),
        ("min_8bit_size=256", 256),
        (" eps = 1e-8, min_8bit_size = 256", 256),
    ],
)
def test_the_bound(given, bound) -> None:
    optimizer = SimpleNamespace(args=SimpleNamespace(min_8bit_size=4096))
    set_min_8bit_size(optimizer, given)
    assert optimizer.args.min_8bit_size == bound


@pytest.mark.parametrize("optimizer", [SimpleNamespace(), SimpleNamespace(args=SimpleNamespace())])
def test_an_optimizer_without_a_bound_is_refused(optimizer) -> None:
    set_min_8bit_size(optimizer, "other=1")
    with pytest.raises(ValueError, match=r"^optim_args: got min_8bit_size, which SimpleNamespace"):
        set_min_8bit_size(optimizer, "min_8bit_size=256")


@pytest.mark.parametrize("number", ["few", "-1", "1.5", ""])
def test_what_is_no_number_is_refused(number) -> None:
    with pytest.raises(ValueError, match=rf"^optim_args: got min_8bit_size={number}, allowed is"):
        set_min_8bit_size(SimpleNamespace(), f"min_8bit_size={number}")
