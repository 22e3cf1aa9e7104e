"""Both layers against the dense layer of the oracle: values, every gradient, what is saved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from sft.kernels import outer_at
from sft.kernels.sparse_linear import delta_linear, linear, linear_reference, resident_linear
from sft.kernels.write import write_

IN, OUT = 6, 5
CASES = [
    pytest.param(shape, bias, k, conv1d, id=f"{len(shape) - 1}D-{bias=}-{k=}-{conv1d=}")
    for shape in [(4, IN), (2, 3, IN)]
    for bias in (True, False)
    for k in (0, 1, 9, IN * OUT)
    for conv1d in (False, True)
]


def operands(shape, bias, k, make_pattern, conv1d, dtype=torch.float64):
    """x, w0, bias, values, pattern; the weight is stored (in, out) with conv1d."""
    torch.manual_seed(k)
    rows, cols = (IN, OUT) if conv1d else (OUT, IN)
    pattern = make_pattern(rows, cols, k)
    x, weight = torch.randn(shape).to(dtype), torch.randn(rows, cols).to(dtype)
    values = torch.randn(k, dtype=torch.promote_types(dtype, torch.float32))
    return x, weight, torch.randn(OUT).to(dtype) if bias else None, values, pattern


def effective(weight, values, pattern):
    """W with w0 + values written at the pattern."""
    weight, flat = weight.clone(), weight.flatten()[pattern.indices.long()]
    write_(weight, pattern.indices, (flat + values).to(weight.dtype))
    return weight


def oracle(x, weight, bias, values, pattern, conv1d):
    if not conv1d:
        return linear_reference(x, weight, bias, values, pattern)
    dense = torch.zeros(weight.numel(), dtype=values.dtype)
    dense = dense.index_put((pattern.indices.long(),), values).view_as(weight)
    return F.linear(x, (weight + dense).t(), bias)


@pytest.mark.parametrize("shape, bias, k, conv1d", CASES)
def test_fact05_fact06_fact07_resident_equals_dense(
    make_pattern, make_site, shape, bias, k, conv1d
) -> None:
    x, weight, b, values, pattern = operands(shape, bias, k, make_pattern, conv1d)
    inputs = {"x": x, "bias": b, "values": values}
    inputs = {name: t.requires_grad_() for name, t in inputs.items() if t is not None}
    expected = oracle(x, weight, b, values, pattern, conv1d)
    resident = effective(weight, values.detach(), pattern)
    got = resident_linear(x, resident, b, values, make_site(pattern), conv1d=conv1d)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(got)
    wanted = torch.autograd.grad(expected, list(inputs.values()), seed)
    found = torch.autograd.grad(got, list(inputs.values()), seed)
    for name, mine, dense in zip(inputs, found, wanted, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12, msg=f"gradient of {name}")


@pytest.mark.parametrize("shape, bias, k, conv1d", CASES)
def test_fact08_gradcheck_of_the_resident_layer(
    make_pattern, make_site, shape, bias, k, conv1d
) -> None:
    x, weight, b, values, pattern = operands(shape, bias, k, make_pattern, conv1d)
    site = make_site(pattern)

    def layer(x, values, b=None):
        # numerical differences move the values, so W has to follow them
        resident = effective(weight, values.detach(), pattern)
        return resident_linear(x, resident, b, values, site, conv1d=conv1d)

    assert gradcheck(layer, [t.requires_grad_() for t in (x, values, b) if t is not None])


@pytest.mark.parametrize("shape, bias, k, conv1d", CASES)
def test_fact08_gradcheck_of_the_delta_layer(
    make_pattern, make_site, shape, bias, k, conv1d
) -> None:
    x, weight, b, values, pattern = operands(shape, bias, k, make_pattern, conv1d)
    site = make_site(pattern)
    x, values = x.requires_grad_(), values.requires_grad_()

    def layer(x, values):
        return delta_linear(x, values, site, conv1d=conv1d)

    assert gradcheck(layer, [x, values])
    whole = linear(x, weight, b, conv1d=conv1d) + layer(x, values)
    expected = oracle(x, weight, b, values, pattern, conv1d)
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [1.0, -1], ids=["sampled", "row blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fact06_low_precision_sums_are_wide(
    monkeypatch, make_pattern, make_site, dtype, limit
) -> None:
    monkeypatch.setattr(outer_at, "SAMPLED_UP_TO", {"cpu": limit})
    x, weight, _, values, pattern = operands((3, 50, IN), False, 9, make_pattern, False, dtype)
    y = resident_linear(x, weight, None, values.requires_grad_(), make_site(pattern), conv1d=False)
    seed = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, values, seed)
    truth = (seed.double().reshape(-1, OUT).t() @ x.double().reshape(-1, IN)).flatten()
    expected = truth[pattern.indices.long()].float()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conv1d", [False, True])
def test_non_contiguous_input(make_pattern, make_site, conv1d) -> None:
    x, weight, b, values, pattern = operands((4, 8, IN), True, 9, make_pattern, conv1d)
    x, site = x.transpose(0, 1)[::2], make_site(pattern)
    assert not x.is_contiguous()
    resident = effective(weight, values, pattern)
    values.requires_grad_()
    expected = oracle(x, weight, b, values, pattern, conv1d)
    seed = torch.randn_like(expected.transpose(0, 1)).transpose(0, 1)
    (dense,) = torch.autograd.grad(expected, values, seed)
    aside = linear(x, weight, b, conv1d=conv1d) + delta_linear(x, values, site, conv1d=conv1d)
    for got in (resident_linear(x, resident, b, values, site, conv1d=conv1d), aside):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        (mine,) = torch.autograd.grad(got, values, seed)
        torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12)


def test_no_tokens(make_pattern, make_site) -> None:
    x, weight, b, values, pattern = operands((0, IN), True, 9, make_pattern, False)
    values.requires_grad_()
    for layer in (
        lambda: resident_linear(x, weight, b, values, make_site(pattern), conv1d=False),
        lambda: delta_linear(x, values, make_site(pattern), conv1d=False),
    ):
        y = layer()
        assert y.shape == (0, OUT)
        assert not torch.autograd.grad(y.sum(), values)[0].any()


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_autocast_is_that_of_a_stock_layer(make_pattern, make_site, bias, conv1d) -> None:
    x, weight, b, values, pattern = operands((4, 7, IN), bias, 9, make_pattern, conv1d, torch.float)
    resident = effective(weight, values, pattern).requires_grad_()
    x.requires_grad_(), values.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        stock = F.linear(x, resident.t() if conv1d else resident, b)
        got = resident_linear(x, resident.detach(), b, values, make_site(pattern), conv1d=conv1d)
    assert got.dtype == stock.dtype == torch.bfloat16
    assert torch.equal(got, stock)
    seed = torch.randn_like(stock)
    dx, dense = torch.autograd.grad(stock, [x, resident], seed)
    mine, dvalues = torch.autograd.grad(got, [x, values], seed)
    assert torch.equal(mine, dx)
    assert dvalues.dtype == torch.float32
    # stock rounds the gradient to bfloat16, ours stays in float32
    torch.testing.assert_close(
        dvalues.bfloat16(), dense.flatten()[pattern.indices.long()].bfloat16(), rtol=1e-2, atol=1e-2
    )


def test_bf16_autocast_of_the_delta_layer(make_pattern, make_site) -> None:
    x, _, _, values, pattern = operands((4, 7, IN), False, 9, make_pattern, False, torch.float)
    values.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = delta_linear(x, values, make_site(pattern), conv1d=False)
    plain = delta_linear(x.bfloat16(), values, make_site(pattern), conv1d=False)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, plain)


@pytest.mark.parametrize("which", ["resident", "delta"])
def test_backward_inside_autocast_sums_in_float32(make_pattern, make_site, which, monkeypatch):
    monkeypatch.setattr(outer_at, "SAMPLED_UP_TO", {"cpu": -1})
    x, weight, _, values, pattern = operands((64, IN), False, 9, make_pattern, False, torch.float)
    values.requires_grad_()
    site, gradients = make_site(pattern), []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if which == "resident":
                y = resident_linear(x, weight, None, values, site, conv1d=False)
            else:
                y = delta_linear(x, values, site, conv1d=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients += torch.autograd.grad(y.float().square().sum(), values)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("which", ["resident", "delta"])
def test_x_is_saved_only_for_trained_values(make_pattern, make_site, which) -> None:
    x, weight, b, values, pattern = operands((4, IN), True, 9, make_pattern, False)

    def packed(trained: bool) -> list[torch.Tensor]:
        saved: list[torch.Tensor] = []
        with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            leaf, mine = x.clone().requires_grad_(), values.clone().requires_grad_(trained)
            site = make_site(pattern)
            if which == "resident":
                resident_linear(leaf, weight, b, mine, site, conv1d=False)
            else:
                delta_linear(leaf, mine, site, conv1d=False)
        return [t for t in saved if t.shape == x.shape]

    assert [len(packed(trained)) for trained in (True, False)] == [1, 0]


def test_no_dense_gradient_is_formed(make_pattern, make_site, largest_tensor) -> None:
    pattern = make_pattern(256, 128, 300)
    x, weight = torch.randn(4, 128, requires_grad=True), torch.randn(256, 128)
    y = resident_linear(
        x, weight, None, torch.zeros(300, requires_grad=True), make_site(pattern), conv1d=False
    )
    assert largest_tensor(lambda: y.sum().backward()) < weight.numel()


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("which", ["resident", "delta"])
def test_the_tap_sees_the_whole_gradient(make_pattern, make_site, which, conv1d) -> None:
    x, weight, _, values, pattern = operands((2, 3, IN), False, 9, make_pattern, conv1d)
    seen = []
    site = make_site(pattern, tap=lambda outer: seen.append(outer.block(0, outer.shape[0])))
    values.requires_grad_()
    if which == "resident":
        y = resident_linear(x, weight, None, values, site, conv1d=conv1d)
    else:
        y = delta_linear(x, values, site, conv1d=conv1d)
    seed = torch.randn_like(y)
    y.backward(seed)
    dense = seed.reshape(-1, OUT).t() @ x.reshape(-1, IN)
    torch.testing.assert_close(seen, [dense.t() if conv1d else dense], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["resident", "delta"])
def test_backward_refuses_a_changed_weight(make_pattern, make_site, which) -> None:
    x, weight, _, values, pattern = operands((4, IN), False, 9, make_pattern, False)
    site = make_site(pattern)
    values.requires_grad_()
    if which == "resident":
        y = resident_linear(x, weight, None, values, site, conv1d=False)
    else:
        y = delta_linear(x, values, site, conv1d=False)
    site.stamp = 1
    with pytest.raises(RuntimeError, match="changed since this forward"):
        y.sum().backward()


def test_one_token_without_leading_dimensions(make_pattern, make_site) -> None:
    x, bias = torch.randn(6), torch.randn(5, requires_grad=True)
    weight, values = torch.randn(5, 6), torch.zeros(4, requires_grad=True)
    site = make_site(make_pattern(5, 6, 4))
    y = resident_linear(x, weight, bias, values, site, conv1d=False)
    upstream = torch.randn(5)
    y.backward(upstream)
    assert torch.equal(bias.grad, upstream)
