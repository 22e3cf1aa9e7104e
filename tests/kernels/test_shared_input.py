from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sft.kernels import outer
from sft.kernels.pattern import Pattern
from sft.kernels.sparse_linear import linear_reference, resident_linear


class Site:
    tap = None
    stamp = 0

    def __init__(self, indices: list[int], shape: tuple[int, int]) -> None:
        self.pattern = Pattern(torch.tensor(indices, dtype=torch.int32), shape)


def readers(num: int) -> list[tuple[torch.Tensor, torch.Tensor, Site]]:
    return [
        (torch.randn(6, 4), torch.zeros(2, requires_grad=True), Site([n, 11 + n], (6, 4)))
        for n in range(num)
    ]


@pytest.fixture
def transpositions(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.Tensor]]:
    made: list[weakref.ref[torch.Tensor]] = []
    original = outer.token_last

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        result = original(tensor)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(outer, "token_last", counted)
    monkeypatch.setattr("sft.kernels.sparse_linear.uses_sampled", lambda *_: True)
    return made


def test_layers_that_read_one_input_share_one_transposition(transpositions) -> None:
    layers = readers(3)
    x = torch.randn(5, 4, requires_grad=True)
    outputs = [resident_linear(x, w, None, v, s, conv1d=False) for w, v, s in layers]
    sum(y.square().sum() for y in outputs).backward()
    assert len(transpositions) == 1
    for weight, values, site in layers:
        expected = torch.zeros(2, requires_grad=True)
        linear_reference(x, weight, None, expected, site.pattern).square().sum().backward()
        torch.testing.assert_close(values.grad, expected.grad)


def test_equal_inputs_that_are_not_the_same_tensor_share_nothing(transpositions) -> None:
    (weight, values, site), (other, others, place) = readers(2)
    x = torch.randn(5, 4)
    y = resident_linear(x, weight, None, values, site, conv1d=False)
    z = resident_linear(x.clone(), other, None, others, place, conv1d=False)
    (y.sum() + z.sum()).backward()
    assert len(transpositions) == 2


def test_the_transposed_copy_goes_with_its_last_reader(transpositions) -> None:
    x = torch.randn(5, 4)
    outputs = [resident_linear(x, w, None, v, s, conv1d=False) for w, v, s in readers(2)]
    loss = sum(y.sum() for y in outputs)
    loss.backward()
    gc.collect()
    assert [copy() for copy in transpositions] == [None]
    assert loss.grad_fn is not None  # the graph itself is still alive


def test_a_forward_without_backward_leaves_nothing_behind(transpositions) -> None:
    """A static input buffer, evaluated, trained, refilled in place, trained again."""
    ((weight, values, site),) = readers(1)
    x = torch.randn(5, 4)
    with torch.no_grad():
        resident_linear(x, weight, None, values, site, conv1d=False)
    for _ in range(2):
        values.grad = None
        resident_linear(x, weight, None, values, site, conv1d=False).square().sum().backward()
        expected = torch.zeros(2, requires_grad=True)
        linear_reference(x, weight, None, expected, site.pattern).square().sum().backward()
        torch.testing.assert_close(values.grad, expected.grad)
        x.copy_(torch.randn(5, 4))


def test_readers_that_compute_in_different_dtypes_share_nothing(transpositions) -> None:
    (weight, values, site), (other, others, place) = readers(2)
    x = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = resident_linear(x, weight, None, values, site, conv1d=False)
    z = resident_linear(x, other, None, others, place, conv1d=False)
    (y.float().sum() + z.sum()).backward()
    assert len(transpositions) == 2
