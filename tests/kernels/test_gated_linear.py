"""The gated low-rank layer against its oracle: values, every gradient, what is saved."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from sft.kernels.gated_linear import gated_delta, gated_linear, gated_linear_reference

IN, OUT, SCALE = 6, 5, 1.75
CASES = [
    pytest.param(shape, bias, rank, conv1d, gated, id=f"{len(shape) - 1}D-{case}")
    for shape in [(4, IN), (2, 3, IN)]
    for case, (bias, rank, conv1d, gated) in {
        "plain": (True, 3, False, True),
        "conv1d": (True, 3, True, True),
        "no bias": (False, 3, False, True),
        "rank 1": (True, 1, True, True),
        "rank 0": (True, 0, False, True),
        "no gate": (False, 3, False, False),
    }.items()
]


def operands(shape, bias, rank, conv1d, gated, dtype=torch.float64):
    """x, weight, bias, a, b, gate; the weight is stored (in, out) with conv1d."""
    torch.manual_seed(rank)
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(shape, dtype=dtype),
        "weight": torch.randn((IN, OUT) if conv1d else (OUT, IN), dtype=dtype),
        "bias": torch.randn(OUT, dtype=dtype) if bias else None,
        "a": torch.randn(rank, IN, dtype=wide),
        "b": torch.randn(OUT, rank, dtype=wide),
        "gate": torch.randn(rank, dtype=wide) if gated else None,
    }


def trained(given, names=("x", "bias", "a", "b", "gate")):
    return [given[n].requires_grad_() for n in names if given[n] is not None]


def close(mine, truth):
    torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape, bias, rank, conv1d, gated", CASES)
def test_layer_and_gradients_equal_the_oracle(shape, bias, rank, conv1d, gated) -> None:
    given = operands(shape, bias, rank, conv1d, gated)
    leaves = trained(given)
    expected = gated_linear_reference(**given, scale=SCALE, conv1d=conv1d)
    found = gated_linear(**given, scale=SCALE, conv1d=conv1d)
    close(found, expected)
    seed = torch.randn_like(found)
    for mine, truth in zip(
        torch.autograd.grad(found, leaves, seed),
        torch.autograd.grad(expected, leaves, seed, materialize_grads=True),
        strict=True,
    ):
        close(mine, truth)


@pytest.mark.parametrize("shape, bias, rank, conv1d, gated", CASES)
def test_gradcheck(shape, bias, rank, conv1d, gated) -> None:
    given = operands(shape, bias, rank, conv1d, gated)
    names = [n for n in ("x", "bias", "a", "b", "gate") if given[n] is not None]

    def layer(*leaves):
        now = given | dict(zip(names, leaves, strict=True))
        return gated_linear(**now, scale=SCALE, conv1d=conv1d)

    assert gradcheck(layer, trained(given))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_contribution_alone(rank, gated) -> None:
    given = operands((2, 3, IN), False, rank, False, gated)
    given["weight"].zero_()
    leaves = trained(given)
    low = {n: given[n] for n in ("x", "a", "b", "gate")}
    found = gated_delta(**low, scale=SCALE)
    expected = gated_linear_reference(**given, scale=SCALE, conv1d=False)
    close(found, expected)
    seed = torch.randn_like(found)
    for mine, truth in zip(
        torch.autograd.grad(found, leaves, seed),
        torch.autograd.grad(expected, leaves, seed, materialize_grads=True),
        strict=True,
    ):
        close(mine, truth)


def test_s4_a_gate_at_zero_can_come_back_and_its_factors_rest() -> None:
    given = operands((4, IN), True, 3, False, True, torch.float32)
    given["gate"][1] = 0
    x, _, a, b, gate = trained(given)
    gated_linear(**given, scale=SCALE, conv1d=False).square().sum().backward()
    assert (a.grad[1] == 0).all() and (b.grad[:, 1] == 0).all()
    assert gate.grad.ne(0).all()
    assert a.grad[[0, 2]].ne(0).all() and b.grad[:, [0, 2]].ne(0).all()
    assert x.grad is not None


@pytest.mark.parametrize("conv1d", [False, True])
def test_dropped_input_reaches_the_low_rank_product_alone(conv1d) -> None:
    given = operands((2, 3, IN), True, 3, conv1d, True)
    leaves = trained(given)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(given["x"], 0.5)
    found = gated_linear(**given, scale=SCALE, conv1d=conv1d, dropped=dropped)
    expected = gated_linear_reference(**given, scale=SCALE, conv1d=conv1d, dropped=dropped)
    close(found, expected)
    seed = torch.randn_like(found)
    for mine, truth in zip(
        torch.autograd.grad(found, leaves, seed, retain_graph=True),
        torch.autograd.grad(expected, leaves, seed),
        strict=True,
    ):
        close(mine, truth)


def saved_by(run):
    """Return what `run` saves for backward and was not there before: (elements, tensors)."""
    found = []

    def pack(tensor):
        found.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    return y, found


@pytest.mark.parametrize("conv1d", [False, True])
def test_only_x_and_its_ranks_are_saved(conv1d) -> None:
    given = operands((2, 3, IN), True, 2, conv1d, True, torch.float32)
    leaves = trained(given, ("x", "a", "b", "gate"))
    _, saved = saved_by(lambda: gated_linear(**given, scale=SCALE, conv1d=conv1d))
    there = {t.data_ptr() for t in given.values() if t is not None}
    fresh = [t for t in saved if t.data_ptr() not in there]
    assert [tuple(t.shape) for t in fresh] == [(2, 6)]
    # frozen below: neither the weight nor a gradient of x is needed
    leaves[0].requires_grad_(False)
    _, saved = saved_by(lambda: gated_linear(**given, scale=SCALE, conv1d=conv1d))
    assert given["weight"].data_ptr() not in {t.data_ptr() for t in saved}
    # nothing trained here: x is let go
    for leaf in leaves[1:]:
        leaf.requires_grad_(False)
    given["x"].requires_grad_()
    _, saved = saved_by(lambda: gated_linear(**given, scale=SCALE, conv1d=conv1d))
    assert given["x"].data_ptr() not in {t.data_ptr() for t in saved}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_train_float32_values(dtype, autocast) -> None:
    base = torch.float32 if autocast else dtype
    given = operands((3, 50, IN), True, 3, False, True, base)
    leaves = trained(given, ("x", "a", "b", "gate"))
    with torch.autocast("cpu", dtype if dtype != torch.float32 else None, enabled=autocast):
        y = gated_linear(**given, scale=SCALE, conv1d=False)
    assert y.dtype == (dtype if autocast and dtype != torch.float32 else y.dtype)
    seed = torch.randn_like(y)
    wide = {n: t if t is None else t.detach().double() for n, t in given.items()}
    truth = gated_linear_reference(**wide, scale=SCALE, conv1d=False)
    tolerance = 1e-5 if y.dtype == torch.float32 else 0.1
    torch.testing.assert_close(y.double(), truth, rtol=tolerance, atol=tolerance)
    doubles = [wide[n].requires_grad_() for n in ("x", "a", "b", "gate")]
    again = gated_linear_reference(**wide, scale=SCALE, conv1d=False)
    wanted = torch.autograd.grad(again, doubles, seed.double())
    for leaf, mine, exact in zip(leaves, torch.autograd.grad(y, leaves, seed), wanted, strict=True):
        assert mine.dtype == leaf.dtype
        error = (mine.double() - exact).norm() / exact.norm()
        assert error < (1e-5 if y.dtype == torch.float32 else 0.02)


def test_non_contiguous_input_and_gradient() -> None:
    given = operands((4, 8, IN), True, 3, False, True)
    given["x"] = given["x"].transpose(0, 1)[::2]
    leaves = trained(given)
    found = gated_linear(**given, scale=SCALE, conv1d=False)
    expected = gated_linear_reference(**given, scale=SCALE, conv1d=False)
    close(found, expected)
    seed = torch.randn(1, OUT, dtype=torch.float64).expand_as(found)
    for mine, truth in zip(
        torch.autograd.grad(found, leaves, seed),
        torch.autograd.grad(expected, leaves, seed),
        strict=True,
    ):
        close(mine, truth)


def test_factors_that_changed_since_forward_are_refused() -> None:
    given = operands((4, IN), True, 3, False, True)
    leaves = trained(given, ("a", "b", "gate"))
    for leaf in leaves:
        y = gated_linear(**given, scale=SCALE, conv1d=False)
        with torch.no_grad():
            leaf.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
