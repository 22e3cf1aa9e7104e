"""The chunked loss is that of whole logits, as is its gradient, and the logits are never whole."""

from __future__ import annotations

import pytest
import torch

from sft.kernels.linear_cross_entropy import (
    CHUNK_ENTRIES,
    Tail,
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

TAILS = {
    "plain": Tail(),
    "scaled": Tail(scale=0.3),
    "softcap": Tail(softcap=2.0),
    "both": Tail(scale=1.7, softcap=3.0),
}


def inputs(n=7, d=5, vocabulary=11, dtype=torch.float64, bias=True):
    torch.manual_seed(n)
    made = torch.randn(n, d), torch.randn(vocabulary, d), torch.randn(vocabulary)
    x, weight, b = (t.to(dtype).requires_grad_() for t in made)
    return x, weight, b if bias else None, torch.randint(vocabulary, (n,))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("rows", [1, 3, 7, 100], ids=str)
def test_equals_the_oracle(rows, tail, bias) -> None:
    x, weight, b, targets = inputs(bias=bias)
    leaves = [t for t in (x, weight, b) if t is not None]
    wanted = linear_cross_entropy_reference(x, weight, b, targets, tail=tail)
    found = linear_cross_entropy(x, weight, b, targets, tail=tail, rows=rows)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    expected = torch.autograd.grad(2.5 * wanted, leaves)
    for got, want in zip(torch.autograd.grad(2.5 * found, leaves), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_the_gradient_is_that_of_the_loss(tail) -> None:
    x, weight, b, targets = inputs()
    torch.autograd.gradcheck(
        lambda *leaves: linear_cross_entropy(*leaves, targets, tail=tail, rows=2), (x, weight, b)
    )


def test_only_what_is_asked_for_is_made() -> None:
    x, weight, b, targets = inputs()
    frozen = linear_cross_entropy(x, weight.detach(), b.detach(), targets)
    assert [g is not None for g in frozen.grad_fn.gradients] == [True, False, False]
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, b, targets).requires_grad


def test_no_rows_cost_nothing_and_have_a_gradient() -> None:
    x, weight, b, targets = inputs(n=0)
    loss = linear_cross_entropy(x, weight, b, targets)
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, 5) and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sums_of_half_precision_are_float32(dtype) -> None:
    x, weight, _, targets = inputs(n=600, d=16, vocabulary=50, dtype=dtype, bias=False)
    found = linear_cross_entropy(x, weight, None, targets, rows=1)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = linear_cross_entropy_reference(*wide, None, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-3)
    found.backward()
    exact.backward()
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, dtype)
    # 600 additions in bfloat16 would lose far more than the products' own rounding
    error = (weight.grad - wide[1].grad).norm() / wide[1].grad.norm()
    assert error < (4e-3 if dtype == torch.bfloat16 else 1e-3)


def test_a_bias_of_half_precision_sums_its_gradient_in_float32() -> None:
    x, weight, b, targets = inputs(n=600, d=16, vocabulary=50, dtype=torch.bfloat16)
    linear_cross_entropy(x, weight, b, targets, rows=1).backward()
    wide = [t.detach().double().requires_grad_() for t in (x, weight, b)]
    linear_cross_entropy_reference(*wide, targets).backward()
    assert b.grad.dtype == torch.bfloat16
    assert (b.grad - wide[2].grad).norm() / wide[2].grad.norm() < 4e-3


def test_logits_far_from_zero_stay_finite() -> None:
    x, weight, b, targets = inputs(dtype=torch.float32)
    for shift in (-1e4, 1e4):
        moved = (x, weight, b + shift)  # of all logits: nothing changes but rounding
        wanted = linear_cross_entropy(x, weight, b, targets)
        assert linear_cross_entropy(*moved, targets).item() == pytest.approx(wanted.item(), abs=0.1)


@pytest.mark.parametrize("asked", ["no grad", "frozen", "trained"])
def test_a_gradient_that_nobody_reads_is_not_made(asked) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, b, targets = inputs()
    if asked == "frozen":
        x, weight, b = x.detach(), weight.detach(), b.detach()
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(asked != "no grad"):
        linear_cross_entropy(x, weight, b, targets)
    product = 2 * x.shape[0] * weight.numel()
    assert (counter.get_total_flops() > product) == (asked == "trained")


def test_a_chunk_has_a_row_at_least() -> None:
    assert chunk_rows(2 * CHUNK_ENTRIES) == 1
    assert chunk_rows(3) == CHUNK_ENTRIES // 3


def test_autocast_takes_products_in_half_precision() -> None:
    x, weight, b, targets = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, b, targets)
    cast = [t.detach().bfloat16() for t in (x, weight, b)]
    assert loss.item() == linear_cross_entropy(*cast, targets).item()
    loss.backward()
    assert weight.grad.dtype == torch.float32


def test_logits_are_never_whole(largest_tensor) -> None:
    """With 150,000 words and 300 labels, whole logits were 180 MB."""
    x, weight, _, targets = inputs(n=300, d=8, vocabulary=150_000, dtype=torch.float32, bias=False)
    weight = weight.detach()
    rows = chunk_rows(150_000)

    def step(loss):
        loss(x, weight, None, targets).backward()

    found = largest_tensor(lambda: step(linear_cross_entropy))
    assert found == rows * 150_000 * 4 <= CHUNK_ENTRIES * 4
    assert largest_tensor(lambda: step(linear_cross_entropy_reference)) == 300 * 150_000 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 3, 5)}, "x: got shape"),
        ({"targets": (6,)}, "targets: got shape"),
        ({"rows": 0}, "rows: got 0"),
    ],
    ids=["x", "targets", "rows"],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    x, weight, b, targets = inputs()
    x = torch.zeros(change["x"]) if "x" in change else x
    targets = targets[:6] if "targets" in change else targets
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(x, weight, b, targets, rows=change.get("rows"))
