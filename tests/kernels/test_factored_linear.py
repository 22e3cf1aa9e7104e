"""Factored and composed layers against the dense layer, and against each other."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from sft.kernels import outer_at
from sft.kernels.composed_linear import composed_linear
from sft.kernels.factored_linear import (
    factored_is_faster,
    factored_linear,
    factored_linear_reference,
)

IN, OUT, RANK = 6, 5, 2
CASES = [
    pytest.param(shape, bias, k, conv1d, trained, id=f"{len(shape) - 1}D-{k=}-{conv1d=}-{trained=}")
    for shape, bias in [((4, IN), True), ((2, 3, IN), False)]
    for k in (0, 9, IN * OUT)
    for conv1d in (False, True)
    for trained in (False, True)
]


def operands(make_pattern, shape=(4, IN), bias=True, k=9, conv1d=False, trained=False):
    """Trained operands by name, and the pattern, in float64."""
    torch.manual_seed(k)
    pattern = make_pattern(*((IN, OUT) if conv1d else (OUT, IN)), k)
    named = {
        "x": torch.randn(shape),
        "a": torch.randn(RANK, IN),
        "b": torch.randn(OUT, RANK),
        "values": torch.randn(k),
        "scale": torch.tensor(0.76) if trained else 0.25,
        "bias": torch.randn(OUT) if bias else None,
    }
    for name, tensor in named.items():
        if isinstance(tensor, torch.Tensor):
            named[name] = tensor.double().requires_grad_()
    return named, pattern


def tensors(named):
    return [t for t in named.values() if isinstance(t, torch.Tensor) and t.requires_grad]


@pytest.fixture(params=[1.0, -1], ids=["sampled", "row blocks"])
def path(request, monkeypatch):
    """Take each path to the gradient of the values."""
    monkeypatch.setattr(outer_at, "SAMPLED_UP_TO", {"cpu": request.param})


@pytest.mark.parametrize("shape, bias, k, conv1d, trained", CASES)
def test_fact19_factored_equals_dense(
    make_pattern, make_site, path, shape, bias, k, conv1d, trained
) -> None:
    named, pattern = operands(make_pattern, shape, bias, k, conv1d, trained)
    site = make_site(pattern)
    weight = torch.randn(pattern.shape).double()
    for base in (None, weight):
        expected = factored_linear_reference(**named, site=site, weight=base, conv1d=conv1d)
        got = factored_linear(**named, site=site, weight=base, conv1d=conv1d)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        seed = torch.randn_like(got)
        wanted = torch.autograd.grad(expected, tensors(named), seed)
        found = torch.autograd.grad(got, tensors(named), seed)
        for mine, dense in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape, bias, k, conv1d, trained", CASES)
def test_fact19_gradcheck(make_pattern, make_site, shape, bias, k, conv1d, trained) -> None:
    named, pattern = operands(make_pattern, shape, bias, k, conv1d, trained)
    inputs = [name for name, value in named.items() if isinstance(value, torch.Tensor)]

    def layer(*given):
        replaced = named | dict(zip(inputs, given, strict=True))
        return factored_linear(**replaced, site=make_site(pattern), conv1d=conv1d)

    assert gradcheck(layer, tensors(named))


@pytest.mark.parametrize("trained", [False, True])
def test_fact19_both_kernels_agree_in_float32(make_pattern, make_site, trained) -> None:
    rows, cols, rank, k = 48, 64, 8, 90
    site = make_site(make_pattern(rows, cols, k))
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (4, 9, cols), "a": (rank, cols), "b": (rows, rank), "values": (k,)}
    named = {n: torch.randn(s, generator=generator).requires_grad_() for n, s in sizes.items()}
    named["scale"] = torch.tensor(0.5, requires_grad=True) if trained else 0.5
    results = []
    for op in (composed_linear, factored_linear):
        y = op(**named, site=site)
        seed = torch.ones_like(y) / y.numel()
        results.append((y, *torch.autograd.grad(y, tensors(named), seed)))
    for composed, factored in zip(*results, strict=True):
        torch.testing.assert_close(composed, factored, rtol=1e-4, atol=1e-4)


def bytes_saved(op, named, site, **more) -> dict[int, int]:
    """Sizes by storage of what backward keeps, parameters left out."""
    known = {t.untyped_storage().data_ptr() for n, t in named.items() if n in ("a", "b", "values")}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        op(**named, site=site, **more)
    return seen


def test_fact20_saved_is_the_input_and_its_projection(make_pattern, make_site) -> None:
    named, pattern = operands(make_pattern, (7, IN))
    saved = bytes_saved(factored_linear, named, make_site(pattern))
    assert sorted(saved.values()) == sorted([7 * IN * 8, 7 * RANK * 8])


def test_nothing_is_saved_for_frozen_factors(make_pattern, make_site) -> None:
    named, pattern = operands(make_pattern, (7, IN))
    for name in ("a", "b", "values"):
        named[name].requires_grad_(False)
    assert bytes_saved(factored_linear, named, make_site(pattern)) == {}


@pytest.mark.parametrize("op", [composed_linear, factored_linear])
def test_fact22_index_width_changes_no_bit(make_pattern, make_site, op) -> None:
    results = []
    for dtype in (torch.int32, torch.int64):
        named, _ = operands(make_pattern, (7, IN))
        y = op(**named, site=make_site(make_pattern(OUT, IN, 9, dtype)))
        results.append((y, *torch.autograd.grad(y.square().sum(), tensors(named))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("op", [composed_linear, factored_linear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_and_float32_parameters(make_pattern, make_site, op, dtype) -> None:
    named, pattern = operands(make_pattern, (7, IN))
    low = {n: t.detach().float() if n != "scale" else t for n, t in named.items()}
    low = {n: t.requires_grad_() if n != "scale" else t for n, t in low.items()}
    low["x"], low["bias"] = (low[n].detach().to(dtype).requires_grad_() for n in ("x", "bias"))
    site = make_site(pattern)
    y = op(**low, site=site)
    assert y.dtype == dtype
    expected = factored_linear_reference(**named, site=site)
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert all(low[n].grad.dtype == torch.float32 for n in ("a", "b", "values"))


@pytest.mark.parametrize("op", [composed_linear, factored_linear])
def test_autocast_is_that_of_a_stock_layer(make_pattern, make_site, op) -> None:
    named, pattern = operands(make_pattern, (7, IN))
    named = {n: t if n == "scale" else t.detach().float() for n, t in named.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = op(**named, site=make_site(pattern))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("op", [composed_linear, factored_linear])
def test_no_tokens(make_pattern, make_site, op) -> None:
    named, pattern = operands(make_pattern, (0, IN))
    y = op(**named, site=make_site(pattern))
    assert y.shape == (0, OUT)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), tensors(named)))


@pytest.mark.parametrize("op", [composed_linear, factored_linear])
def test_a_tap_sees_the_dense_gradient(make_pattern, make_site, op) -> None:
    named, pattern = operands(make_pattern, (7, IN))
    site, seen = make_site(pattern), []
    site.tap = lambda outer: seen.append(outer.block(0, OUT))
    y = op(**named, site=site)
    y.sum().backward()
    x = named["x"].detach()
    torch.testing.assert_close(seen[0], torch.ones(7, OUT).double().t() @ x)


@pytest.mark.parametrize("op", [composed_linear, factored_linear])
def test_changed_content_is_refused(make_pattern, make_site, op) -> None:
    named, pattern = operands(make_pattern)
    site = make_site(pattern)
    y = op(**named, site=site)
    site.stamp = 1
    with pytest.raises(RuntimeError, match="changed since this forward"):
        y.sum().backward()


def test_the_rule_reads_shapes_alone() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    entries = int(0.03 * 1536 * 576)
    assert factored_is_faster((1536, 576), 512, 128, entries, cpu)
    assert not factored_is_faster((1536, 576), 65536, 128, entries, gpu)
    # one token, as in generation: composing would cost the whole matrix
    assert factored_is_faster((1536, 576), 1, 128, entries, gpu)
    assert not factored_is_faster((64, 64), 512, 64, 122, cpu)
