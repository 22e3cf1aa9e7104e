"""The composed layer against the dense layer, and what it keeps and allocates."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from sft.kernels.compose_weight import compose_weight
from sft.kernels.composed_linear import (
    _workspace,
    composed_linear,
    composed_linear_reference,
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
    torch.manual_seed(k)
    pattern = make_pattern(*((IN, OUT) if conv1d else (OUT, IN)), k)
    sizes = {"x": shape, "a": (RANK, IN), "b": (OUT, RANK), "values": (k,), "bias": (OUT,)}
    named = {n: torch.randn(s, dtype=torch.float64).requires_grad_() for n, s in sizes.items()}
    named["scale"] = torch.tensor(0.76).double().requires_grad_() if trained else 0.25
    return (named if bias else named | {"bias": None}), pattern


def tensors(named):
    return [t for t in named.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("shape, bias, k, conv1d, trained", CASES)
def test_fact19_composed_equals_dense(
    make_pattern, make_site, shape, bias, k, conv1d, trained
) -> None:
    named, pattern = operands(make_pattern, shape, bias, k, conv1d, trained)
    site = make_site(pattern)
    expected = composed_linear_reference(**named, site=site, conv1d=conv1d)
    got = composed_linear(**named, site=site, conv1d=conv1d)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(got)
    wanted = torch.autograd.grad(expected, tensors(named), seed)
    found = torch.autograd.grad(got, tensors(named), seed)
    for mine, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-10)

    def layer(*given):
        inputs = [n for n, t in named.items() if isinstance(t, torch.Tensor)]
        replaced = named | dict(zip(inputs, given, strict=True))
        return composed_linear(**replaced, site=site, conv1d=conv1d)

    assert gradcheck(layer, tensors(named))


def test_weight_is_composed_in_the_stored_shape(make_pattern) -> None:
    for conv1d in (False, True):
        named, pattern = operands(make_pattern, conv1d=conv1d)
        parts = [named[n].detach() for n in ("a", "b", "values")]
        stored = compose_weight(*parts, 0.5, pattern, conv1d=conv1d)
        expected = 0.5 * (parts[1] @ parts[0])
        expected = (expected.t() if conv1d else expected).contiguous()
        expected.view(-1)[pattern.indices.long()] += parts[2]
        torch.testing.assert_close(stored, expected)


def test_fact20_saved_is_the_input_alone(make_pattern, make_site) -> None:
    named, pattern = operands(make_pattern, (7, IN))
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        composed_linear(**named, site=make_site(pattern))
    references = {id(named[n]) for n in ("a", "b", "values")}
    others = [t for t in saved if id(t) not in references]
    assert [t.untyped_storage().nbytes() for t in others] == [7 * IN * 8]
    assert others[0].data_ptr() == named["x"].data_ptr()


class Largest(TorchDispatchMode):
    """Counts the storages of at least so many bytes that come to be."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes, self.found = nbytes, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.nbytes:
                    self.found.add(storage.data_ptr())
        return out


def test_fact20_one_matrix_serves_all_layers(make_pattern, make_site) -> None:
    rows, cols, tokens = 64, 48, 3
    x = torch.randn(tokens, cols, requires_grad=True)
    site = make_site(make_pattern(rows, cols, 90))
    _workspace.__init__()
    with Largest(rows * cols * 4) as large:
        for layer in range(3):
            a, b = torch.randn(RANK, cols), torch.randn(rows, RANK)
            values = torch.randn(90)
            parts = [t.requires_grad_() for t in (a, b, values)]
            composed_linear(x, *parts, 0.1 * layer, site).sum().backward()
    assert len(large.found) == 1


def test_threads_share_no_workspace() -> None:
    like, taken = torch.zeros(1), []

    def take() -> None:
        taken.append(_workspace.take((4, 4), like))

    take()
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert taken[0].data_ptr() != taken[1].data_ptr()


def test_the_workspace_outlives_inference_mode() -> None:
    like = torch.zeros(1)
    _workspace.__init__()
    with torch.inference_mode():
        first = _workspace.take((3, 4), like)
    later = _workspace.take((3, 4), like).fill_(1.0)
    assert later.data_ptr() == first.data_ptr()
    assert not later.is_inference()
