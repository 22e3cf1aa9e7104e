"""Both layers against the dense layer of the oracle: values, every gradient, what is saved."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from sft.kernels import slice_linear as kernel
from sft.kernels.lines import write_lines_
from sft.kernels.slice_linear import (
    resident_slice_linear,
    select,
    slice_linear,
    slice_linear_reference,
)

IN, OUT = 6, 5
SCATTERED, RUN = (0, 2, 4), (1, 2, 3)
CHOICES = {"scattered": SCATTERED, "run": RUN, "none": (), "all": tuple(range(5))}
CASES = [
    pytest.param(shape, bias, side, which, conv1d, id=f"{shape}-{side}-{name}-{bias=}-{conv1d=}")
    for shape in [(IN,), (4, IN), (2, 3, IN)]
    for side in ("in", "out")
    for name, which in CHOICES.items()
    for bias, conv1d in [(True, False), (False, False), (True, True)]
]


@dataclass
class Spot:
    side: str
    indices: torch.Tensor
    start: int | None = None
    stamp: object = 0


def spot(side: str, which: tuple[int, ...]) -> Spot:
    run = bool(which) and which == tuple(range(which[0], which[-1] + 1))
    start = which[0] if run else None
    return Spot(side, torch.tensor(which, dtype=torch.int32), start)


def operands(shape, bias, site, dtype=torch.float64):
    """x, w0 (out, in), bias, values."""
    torch.manual_seed(len(shape))
    other = OUT if site.side == "in" else IN
    x, weight = torch.randn(shape).to(dtype), torch.randn(OUT, IN).to(dtype)
    values = torch.randn(
        site.indices.numel(), other, dtype=torch.promote_types(dtype, torch.float32)
    )
    return x, weight, torch.randn(OUT).to(dtype) if bias else None, values


def effective(weight, values, site, conv1d):
    """The stored W with w0 + values written at the slice."""
    weight, axis = weight.clone(), 1 if site.side == "in" else 0
    lines = weight.index_select(axis, site.indices)
    lines = (lines.t() if axis else lines) + values
    write_lines_(weight, site.indices, axis, lines.to(weight.dtype))
    return weight.t().contiguous() if conv1d else weight


@pytest.mark.parametrize("shape, bias, side, which, conv1d", CASES)
def test_s2ft_fact04_resident_equals_dense(shape, bias, side, which, conv1d) -> None:
    site = spot(side, which)
    x, weight, b, values = operands(shape, bias, site)
    inputs = {"x": x, "bias": b, "values": values}
    inputs = {name: t.requires_grad_() for name, t in inputs.items() if t is not None}
    expected = slice_linear_reference(x, weight, b, values, site)
    resident = effective(weight, values.detach(), site, conv1d)
    got = resident_slice_linear(x, resident, b, values, site, conv1d=conv1d)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(got)
    wanted = torch.autograd.grad(expected, list(inputs.values()), seed)
    found = torch.autograd.grad(got, list(inputs.values()), seed)
    for name, mine, dense in zip(inputs, found, wanted, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12, msg=f"gradient of {name}")


@pytest.mark.parametrize("side", ["in", "out"])
def test_s2ft_fact04_the_gradient_is_the_slice_of_the_dense_one(side) -> None:
    site = spot(side, SCATTERED)
    x, weight, b, values = operands((7, IN), True, site, torch.float32)
    resident = effective(weight, values, site, False).requires_grad_()
    dense = F.linear(x, resident, b)
    seed = torch.randn_like(dense)
    (whole,) = torch.autograd.grad(dense, resident, seed)
    values.requires_grad_()
    got = resident_slice_linear(x, resident.detach(), b, values, site, conv1d=False)
    (mine,) = torch.autograd.grad(got, values, seed)
    where = site.indices.long()
    expected = whole[:, where].t() if side == "in" else whole[where]
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape, bias, side, which, conv1d", CASES)
def test_s2ft_fact04_gradcheck_of_the_resident_layer(shape, bias, side, which, conv1d) -> None:
    site = spot(side, which)
    x, weight, b, values = operands(shape, bias, site)

    def layer(x, values, b=None):
        # numerical differences move the values, so W has to follow them
        resident = effective(weight, values.detach(), site, conv1d)
        return resident_slice_linear(x, resident, b, values, site, conv1d=conv1d)

    assert gradcheck(layer, [t.requires_grad_() for t in (x, values, b) if t is not None])


@pytest.mark.parametrize("shape, bias, side, which, conv1d", CASES)
def test_s2ft_fact04_gradcheck_of_the_slice_alone(shape, bias, side, which, conv1d) -> None:
    site = spot(side, which)
    x, weight, b, values = operands(shape, bias, site)
    x, values = x.requires_grad_(), values.requires_grad_()

    def layer(x, values):
        return slice_linear(x, values, site, out_features=OUT)

    assert gradcheck(layer, [x, values])
    whole = F.linear(x, weight, b) + layer(x, values)
    expected = slice_linear_reference(x, weight, b, values, site)
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-12)


# -- what is saved ---------------------------------------------------------------------------


def saved_bytes(run, *parameters: torch.Tensor) -> int:
    """Bytes of the distinct storages that a graph keeps, those of `parameters` left out."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        graph = run()  # a graph that is dropped would let another storage take an address
    assert graph.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("which", [SCATTERED, RUN], ids=["indices", "run"])
@pytest.mark.parametrize("form", ["resident", "aside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["in", "out"])
def test_s2ft_fact07_saved_bytes_are_exact(side, dtype, form, which) -> None:
    site, tokens = spot(side, which), 8
    x, weight, b, values = operands((2, 4, IN), True, site, dtype)
    values.requires_grad_(), x.requires_grad_()

    def run():
        if form == "resident":
            return resident_slice_linear(x, weight, b, values, site, conv1d=False)
        return slice_linear(x, values, site, out_features=OUT)

    width = len(which) if side == "in" else IN
    assert saved_bytes(run, weight, b, values) == tokens * width * x.element_size()


@pytest.mark.parametrize("form", ["resident", "aside", "stock"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_s2ft_fact07_a_frozen_layer_saves_nothing(side, form) -> None:
    site = spot(side, SCATTERED)
    x, weight, b, values = operands((2, 4, IN), True, site)
    x.requires_grad_()

    def run():
        if form == "stock":
            return F.linear(x, weight, b)
        if form == "resident":
            return resident_slice_linear(x, weight, b, values, site, conv1d=False)
        return slice_linear(x, values, site, out_features=OUT)

    assert saved_bytes(run, weight, b, values) == 0


def test_s2ft_fact07_the_gauge_sees_a_view_for_what_it_keeps() -> None:
    x = torch.randn(8, IN)
    values = torch.randn(3, OUT, requires_grad=True)
    assert saved_bytes(lambda: x[:, 1:4] @ values, values) == 8 * IN * 4


@pytest.mark.parametrize("conv1d", [False, True])
def test_without_gradients_nothing_is_copied(conv1d, monkeypatch) -> None:
    """Also in the first pass of a block that is checkpointed."""
    site = spot("in", SCATTERED)
    x, weight, b, values = operands((2, 4, IN), True, site)
    values.requires_grad_()
    stored = weight.t().contiguous() if conv1d else weight
    expected = resident_slice_linear(x, stored, b, values, site, conv1d=conv1d)
    monkeypatch.setattr(kernel, "select", None)
    with torch.no_grad():
        y = resident_slice_linear(x, stored, b, values, site, conv1d=conv1d)
    assert torch.equal(y, expected)


def test_select_never_returns_a_view() -> None:
    x = torch.randn(4, IN)
    for site in (spot("in", SCATTERED), spot("in", RUN), spot("in", tuple(range(IN)))):
        part = select(x, site)
        assert torch.equal(part, x[:, site.indices.long()])
        assert part.untyped_storage().nbytes() == part.numel() * 4
        assert part.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("side", ["in", "out"])
def test_no_dense_gradient_is_formed(side, largest_tensor) -> None:
    site = spot(side, SCATTERED)
    x, weight = torch.randn(4, 128, requires_grad=True), torch.randn(256, 128)
    values = torch.zeros(3, 256 if side == "in" else 128, requires_grad=True)
    y = resident_slice_linear(x, weight, None, values, site, conv1d=False)
    assert largest_tensor(lambda: y.sum().backward()) < weight.numel()


@pytest.mark.parametrize("form", ["resident", "aside"])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_needs_a_gradient_gets_one(side, form, wanted) -> None:
    site = spot(side, SCATTERED)
    x, weight, b, values = operands((4, IN), True, site)
    x.requires_grad_(wanted[0]), values.requires_grad_(wanted[1])
    if form == "resident":
        y = resident_slice_linear(x, weight, b, values, site, conv1d=False)
    else:
        y = slice_linear(x, values, site, out_features=OUT)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.sum().backward()
    assert [x.grad is not None, values.grad is not None] == list(wanted)
    assert weight.grad is None and b.grad is None


# -- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_sums_are_wide(side, dtype) -> None:
    site = spot(side, SCATTERED)
    x, weight, _, values = operands((3, 50, IN), False, site, dtype)
    y = resident_slice_linear(x, weight, None, values.requires_grad_(), site, conv1d=False)
    seed = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, values, seed)
    truth, where = (
        seed.double().reshape(-1, OUT).t() @ x.double().reshape(-1, IN),
        site.indices.long(),
    )
    expected = truth[:, where].t() if side == "in" else truth[where]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_autocast_is_that_of_a_stock_layer(side, conv1d, bias) -> None:
    site = spot(side, SCATTERED)
    x, weight, b, values = operands((4, 7, IN), bias, site, torch.float32)
    resident = effective(weight, values, site, conv1d).requires_grad_()
    x.requires_grad_(), values.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        stock = F.linear(x, resident.t() if conv1d else resident, b)
        got = resident_slice_linear(x, resident.detach(), b, values, site, conv1d=conv1d)
    assert got.dtype == stock.dtype == torch.bfloat16
    assert torch.equal(got, stock)
    seed = torch.randn_like(stock)
    dx, dense = torch.autograd.grad(stock, [x, resident], seed)
    mine, dvalues = torch.autograd.grad(got, [x, values], seed)
    assert torch.equal(mine, dx)
    assert dvalues.dtype == torch.float32
    dense, where = dense.t() if conv1d else dense, site.indices.long()
    dense = dense[:, where].t() if side == "in" else dense[where]
    # stock rounds the gradient to bfloat16, ours stays in float32
    torch.testing.assert_close(dvalues.bfloat16(), dense.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("side", ["in", "out"])
def test_autocast_saves_the_cast_slice(side) -> None:
    site = spot(side, SCATTERED)
    x, weight, b, values = operands((8, IN), True, site, torch.float32)
    values.requires_grad_()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return resident_slice_linear(x, weight, b, values, site, conv1d=False)

    width = len(SCATTERED) if side == "in" else IN
    assert saved_bytes(run, weight, b, values) == 8 * width * 2


@pytest.mark.parametrize("side", ["in", "out"])
def test_autocast_of_the_slice_alone(side) -> None:
    site = spot(side, SCATTERED)
    x, _, _, values = operands((4, 7, IN), False, site, torch.float32)
    values.requires_grad_()
    gradients = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            got = slice_linear(x, values, site, out_features=OUT)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients += torch.autograd.grad(got.float().square().sum(), values)
    plain = slice_linear(x.bfloat16(), values, site, out_features=OUT)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, plain)
    assert torch.equal(*gradients)


# -- odd inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("which", [SCATTERED, RUN])
def test_non_contiguous_input(side, which) -> None:
    site = spot(side, which)
    x, weight, b, values = operands((4, 8, IN), True, site)
    x = x.transpose(0, 1)[::2]
    assert not x.is_contiguous()
    resident = effective(weight, values, site, False)
    values.requires_grad_()
    expected = slice_linear_reference(x, weight, b, values, site)
    seed = torch.randn_like(expected.transpose(0, 1)).transpose(0, 1)
    (dense,) = torch.autograd.grad(expected, values, seed)
    aside = F.linear(x, weight, b) + slice_linear(x, values, site, out_features=OUT)
    for got in (resident_slice_linear(x, resident, b, values, site, conv1d=False), aside):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        (mine,) = torch.autograd.grad(got, values, seed)
        torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", ["in", "out"])
def test_no_tokens(side) -> None:
    site = spot(side, SCATTERED)
    x, weight, b, values = operands((0, IN), True, site)
    values.requires_grad_()
    for y in (
        resident_slice_linear(x, weight, b, values, site, conv1d=False),
        slice_linear(x, values, site, out_features=OUT),
    ):
        assert y.shape == (0, OUT)
        assert not torch.autograd.grad(y.sum(), values)[0].any()


def test_forward_is_that_of_the_stock_layers() -> None:
    site = spot("in", SCATTERED)
    x, _, _, values = operands((2, 3, IN), True, site, torch.float32)
    stock, conv = nn.Linear(IN, OUT), Conv1D(OUT, IN)
    for layer, conv1d in ((stock, False), (conv, True)):
        got = resident_slice_linear(x, layer.weight, layer.bias, values, site, conv1d=conv1d)
        assert torch.equal(got, layer(x))


@pytest.mark.parametrize("form", ["resident", "aside"])
def test_backward_refuses_a_changed_weight(form) -> None:
    site = spot("in", SCATTERED)
    x, weight, b, values = operands((4, IN), True, site)
    values.requires_grad_()
    if form == "resident":
        y = resident_slice_linear(x, weight, b, values, site, conv1d=False)
    else:
        y = slice_linear(x, values, site, out_features=OUT)
    site.stamp = 1
    with pytest.raises(RuntimeError, match="changed since this forward"):
        y.sum().backward()
