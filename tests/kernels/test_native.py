"""The compiled code for the CPU: the bits of the plain one, which stays its oracle."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from sft.kernels.cpu import native
from sft.kernels.displace import displace
from sft.kernels.displace_rows import displace_rows
from sft.kernels.mask import Magnitude, Mask, Random
from sft.kernels.noise import TILE, noise

built = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("ninja")), reason="no compiler"
)
DRAWS = [(5, 1e-2), (2**63 + 6, -0.3), (8, 0.0), (2**64 - 1, 2.0)]
MASKS: dict[str, Mask | None] = {
    "all": None,
    "small": Magnitude(0.1),
    "random": Random(2**63 + 9, 0.3),
}


def weights(dtype: torch.dtype) -> list[Tensor]:
    """Of odd lengths, of one weight, of whole tiles, shared among threads, transposed, empty."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 1667), (), (2 * TILE,), (65 * TILE + 3,), (77, 60), (0, 4)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[0][0, :4] = torch.tensor([0.0, -0.0, 0.1, -0.1])
    made[4] = made[4].t()
    return made


def same(left: Tensor, right: Tensor) -> bool:
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (left, right)]
    return left.shape == right.shape and torch.equal(*bits)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch):
    """Call twice: compiled, and plain."""

    def call(function):
        monkeypatch.setenv("SFT_NATIVE", "1")
        found = function()
        monkeypatch.setenv("SFT_NATIVE", "0")
        return found, function()

    return call


@built
@pytest.mark.parametrize("kind", ["rademacher", "gaussian_table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_bits_are_those_of_the_plain_code(both, kind, dtype, mask) -> None:
    parameters = [2**32 - 1 - i for i in range(6)]
    for draws, decays in ((DRAWS, [0.1, 0.0] * 3), (DRAWS[2:3], [0.0] * 6)):
        found, expected = both(
            lambda draws=draws, decays=decays: displace(
                weights(dtype), parameters, draws, kind=kind, decays=decays, masks=[mask] * 6
            )
        )
        assert all(map(same, found, expected))


@built
def test_what_the_mask_keeps_keeps_its_bits(both) -> None:
    """Not even a NaN is rewritten."""
    weight = torch.full((TILE,), 0x7F85, dtype=torch.int16).view(torch.bfloat16)
    found, _ = both(lambda: displace([weight], [1], DRAWS, masks=[Magnitude(1.0)])[0])
    assert same(found, weight)


@built
@pytest.mark.parametrize("threads", [1, 3])
def test_any_part_by_any_number_of_threads(both, threads) -> None:
    whole = weights(torch.float32)[3]
    starts = [0, 1, TILE, 2 * TILE + 77]
    parts = [whole[a:b] for a, b in zip(starts, [*starts[1:], len(whole)], strict=True)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, expected = both(lambda: displace(parts, [6] * 4, DRAWS, starts=starts))
        assert same(torch.cat(found), displace([whole], [6], DRAWS)[0])
    finally:
        torch.set_num_threads(before)
    assert all(map(same, found, expected))


@built
def test_rows_and_far_positions(both) -> None:
    table, rows = torch.randn(50, 576), torch.tensor([49, 0, 7])
    assert same(*both(lambda: displace_rows(table, rows, 3, DRAWS, kind="gaussian_table")))
    part = torch.zeros(100)
    options = {"kind": "gaussian_table", "starts": [2**43 + 3]}
    assert same(*(moved[0] for moved in both(lambda: displace([part], [1], DRAWS, **options))))


@built
def test_normals_by_box_muller_are_close(both) -> None:
    """Logarithms and sines are each library's own."""
    zero = torch.zeros(100_001)
    (found,), _ = both(lambda: displace([zero], [3], [(5, -1.0)], kind="gaussian"))
    assert (found - noise(5, 3, 100_001, kind="gaussian")).abs().max() < 2e-6


def test_it_is_off_unless_asked_for(monkeypatch) -> None:
    monkeypatch.delenv("SFT_NATIVE", raising=False)
    monkeypatch.setattr(native, "move", lambda *_: pytest.fail("compiled code ran"))
    displace([torch.ones(3)], [1], DRAWS)
    assert not native.wanted()


def test_an_unknown_value_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("SFT_NATIVE", "yes")
    with pytest.raises(ValueError, match="SFT_NATIVE: got 'yes', allowed is 0 or 1"):
        displace([torch.ones(3)], [1], DRAWS)


def test_without_a_compiler_the_remedy_is_named(monkeypatch) -> None:
    from torch.utils import cpp_extension

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("Ninja is required")

    monkeypatch.setattr(cpp_extension, "load", fail)
    monkeypatch.setenv("SFT_NATIVE", "1")
    native.built.cache_clear()
    with pytest.raises(RuntimeError, match=r"SFT_NATIVE: .* Ninja is required; install g\+\+"):
        displace([torch.ones(3)], [1], DRAWS)
