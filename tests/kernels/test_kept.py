"""Kept inputs against exact fractions, and what rounding by pairwise independent noise promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels import kept as module
from sft.kernels.kept import BLOCK, TILE, draw, form_in, form_of, keep, kept_reference, restore
from sft.kernels.philox import philox_reference

SHAPES = [(), (1,), (0, 5), (3, BLOCK), (2, 3, 70), (1, 2 * TILE + 65)]


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of many magnitudes, with zeros of both signs."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)
    flat = x.view(-1)
    flat[3:5] = torch.tensor([0.0, -0.0])[: len(flat[3:5])]
    return x.to(dtype)


def key_of(seed: int) -> int:
    torch.manual_seed(seed)
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64))


def kept_with(seed: int, x: Tensor, form: str) -> Tensor:
    torch.manual_seed(seed)
    return restore(keep(x, form), torch.float32)


@pytest.mark.parametrize("form", ["int8", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_that_of_the_oracle(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = made(shape, dtype)
    found = kept_with(1, x, form)
    assert found.shape == x.shape
    if form == "bfloat16" and dtype == torch.bfloat16:
        assert torch.equal(found, x.float())
        return
    wanted = torch.tensor([float(v) for v in kept_reference(x, form, key_of(1))])
    # the oracle does not round the scale to float32
    torch.testing.assert_close(found.flatten(), wanted, rtol=3e-7, atol=0)


def test_not_contiguous_inputs_are_kept_in_their_order() -> None:
    x = made((70, 6)).t()
    for form in ("int8", "bfloat16"):
        assert torch.equal(kept_with(0, x, form), kept_with(0, x.contiguous(), form))


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("bfloat16", 16)])
def test_it_takes_so_many_bits(form: str, bits: int) -> None:
    codes, peaks = keep(torch.randn(128, BLOCK), form)
    assert codes.element_size() * 8 == bits
    assert codes.shape == (128, BLOCK)
    assert (peaks is None) == (form == "bfloat16")
    assert peaks is None or peaks.nbytes * 32 == codes.nbytes


@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_the_expectation_is_the_input(form: str) -> None:
    x, rounds = torch.randn(4, 75, generator=torch.Generator().manual_seed(0)), 300
    x[0, :2] = 0
    draws = torch.stack([kept_with(seed, x, form) for seed in range(rounds)]).double()
    error, spread = (draws.mean(0) - x).flatten(), draws.std(0).flatten() / rounds**0.5
    # all but zeros and the peaks of blocks move
    assert spread.count_nonzero() > 290
    assert 0.8 < ((error / spread)[spread > 0] ** 2).mean() < 1.2
    assert not error[:2].any()


def test_a_gradient_varies_as_by_independent_noise() -> None:
    """All pairs of values are independent, across rows, columns and tiles."""
    x, g = torch.randn(3 * TILE // 64, 64), torch.randn(3 * TILE // 64)
    draws = torch.stack([g @ (kept_with(seed, x, "int8") - x) for seed in range(200)])
    codes, peaks = keep(x, "int8")
    step = peaks.float().view(-1, 1) / 127
    up = (x / step) % 1
    independent = (g.unsqueeze(1) ** 2 * step**2 * up * (1 - up)).sum(0)
    assert codes.shape == x.shape
    assert (draws.var(0) / independent).mean().item() == pytest.approx(1, abs=0.05)


def test_noise_is_philox_turned_by_tile() -> None:
    key = 2**62 + 12345
    stream = draw(key, 5).numpy().view(np.uint16)
    assert len(stream) >= TILE + 5
    for i in (0, 1, 7, 8, 4095, 4096, 4100):
        word = philox_reference((key % 2**32, key >> 32), (i // 8, 0, 0, 2))[i % 8 // 2]
        assert stream[i] == word >> 16 * (i % 2) & 0xFFFF


def test_the_key_is_drawn_from_the_generator_that_checkpoints_keep() -> None:
    x = torch.randn(8, 64)
    first, second = (kept_with(3, x, "int8") for _ in range(2))
    third = restore(keep(x, "int8"), torch.float32)
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_what_is_kept_in_full_is_the_input_itself_and_draws_nothing() -> None:
    x = torch.randn(3)
    state = torch.get_rng_state()
    for given, form in [(x, "full"), (x.bfloat16(), "bfloat16"), (x.half(), "bfloat16")]:
        assert keep(given, form).codes is given
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_what_is_not_finite_stays_so(form: str, bad: float) -> None:
    """Loss scaling finds overflows by it; other blocks are spared."""
    x = torch.randn(3, BLOCK)
    x[1, 5] = bad
    found = kept_with(0, x, form)
    assert not found[1, 5].isfinite()
    assert found[[0, 2]].isfinite().all()


def test_a_nan_of_any_bits_stays_one() -> None:
    x = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for form in ("int8", "bfloat16"):
        assert kept_with(0, x, form).isnan().all()


def test_tiny_blocks_do_not_overflow() -> None:
    x = torch.full((BLOCK,), 1e-38)
    assert (kept_with(0, x, "int8") - x).abs().max() < 1e-30


def test_the_largest_value_is_met() -> None:
    x = torch.linspace(-3, 3, BLOCK)
    for seed in range(50):
        assert (kept_with(seed, x, "int8").abs() <= 3 * (1 + 2**-7)).all()


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="saved_inputs: got 'int4', allowed is one of full, bfl"):
        keep(torch.ones(2), "int4")


class TestFormOf:
    trained = torch.ones(1, requires_grad=True)

    def test_without_backward_it_is_full(self) -> None:
        x = torch.randn(2, 2)
        assert form_of(x, self.trained, "int8") == "int8"
        assert form_of(x, torch.ones(1), "int8") == "full"
        with torch.no_grad():
            assert form_of(x, self.trained, "int8") == "full"

    @pytest.mark.parametrize(
        "make",
        [
            lambda x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3).transpose(1, 2),
            lambda x: x.relu(),
            lambda x: x.tanh().view(-1),
        ],
        ids=["attention", "relu", "a view of tanh"],
    )
    def test_what_its_maker_keeps_is_kept_in_full(self, make) -> None:
        x = torch.randn(2, 4, 3, 8, requires_grad=True)
        assert form_of(make(x), self.trained, "int8") == "full"

    @pytest.mark.parametrize(
        "make",
        [lambda x: x * 2, lambda x: x.relu() * x, lambda x: x.relu().clone(), F.gelu],
        ids=["product", "gate", "copy", "gelu"],
    )
    def test_what_nobody_else_keeps_is_compressed(self, make) -> None:
        x = torch.randn(2, 4, requires_grad=True)
        assert form_of(make(x), self.trained, "int8") == "int8"

    def test_what_others_saved_is_not_unpacked(self) -> None:
        """Under gradient checkpointing to look at it would recompute the layer."""
        unpacked = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpacked.append):
            y = torch.randn(3, requires_grad=True).relu()
        assert form_of(y, self.trained, "int8") == "full"
        assert not unpacked


def test_a_chunk_is_whole_tiles_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the work changes nothing."""
    x = made((5, 3001))
    for form in ("int8", "bfloat16"):
        whole = kept_with(4, x, form)
        monkeypatch.setattr(module, "_CHUNK", TILE)
        assert torch.equal(kept_with(4, x, form), whole)
        monkeypatch.undo()


def test_a_layer_draws_one_number_a_call_in_training() -> None:
    values, states = torch.ones(1, requires_grad=True), []
    for training in (True, False):
        torch.manual_seed(0)
        with torch.no_grad():
            assert form_in("int8", values, training=training) == "full"
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), states[1])
    keep(torch.ones(1), "int8")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert form_in("int8", values, training=False) == "int8"
    assert form_in("int8", values.detach(), training=True) == "full"
    assert torch.equal(torch.get_rng_state(), states[0])
