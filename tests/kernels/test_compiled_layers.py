"""The layers in one compiled graph, forward and backward: values and gradients of eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sft.kernels import outer_at
from sft.kernels.slice_linear import resident_slice_linear, slice_linear
from sft.kernels.sparse_linear import delta_linear, resident_linear

pytestmark = pytest.mark.filterwarnings("ignore")  # the tracer warns of what it does itself

IN, OUT, K = 6, 5, 9
Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Spot:
    side: str
    indices: Tensor
    start: int | None
    stamp: object = 0


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()


def operands(values: int, conv1d: bool) -> list[Tensor]:
    """x, weight, bias, values."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 7, IN), (IN, OUT) if conv1d else (OUT, IN), (OUT,), (values,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gradients(layer: Layer, tensors: list[Tensor]) -> list[Tensor | None]:
    leaves = [t.clone().requires_grad_(place != 1) for place, t in enumerate(tensors)]
    y = layer(*leaves)
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check(layer: Layer, tensors: list[Tensor]) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = gradients(compiled, tensors), gradients(layer, tensors)
    for mine, eager in zip(found, expected, strict=True):
        assert (mine is None) == (eager is None)
        if mine is not None:
            torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("limit", [1.0, -1], ids=["sampled", "row blocks"])
@pytest.mark.parametrize("which", ["resident", "delta"])
def test_sparse_layers(monkeypatch, make_pattern, make_site, which, limit, conv1d) -> None:
    monkeypatch.setattr(outer_at, "SAMPLED_UP_TO", {"cpu": limit})
    site = make_site(make_pattern(*((IN, OUT) if conv1d else (OUT, IN)), K))

    def layer(x: Tensor, weight: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        if which == "resident":
            return resident_linear(x, weight, bias, values, site, conv1d=conv1d)
        return delta_linear(x, values, site, conv1d=conv1d)

    check(layer, operands(K, conv1d))


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("indices", [(0, 2, 4), (1, 2, 3)], ids=["scattered", "run"])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("which", ["resident", "slice"])
def test_slice_layers(which, side, indices, conv1d) -> None:
    start = 1 if indices == (1, 2, 3) else None
    site = Spot(side, torch.tensor(indices, dtype=torch.int32), start)
    line = OUT if side == "in" else IN

    def layer(x: Tensor, weight: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        values = values.view(3, line)
        if which == "resident":
            return resident_slice_linear(x, weight, bias, values, site, conv1d=conv1d)
        return slice_linear(x, values, site, out_features=OUT)

    check(layer, operands(3 * line, conv1d))


def test_an_update_compiles_nothing_anew(make_pattern, make_site) -> None:
    """The stamp changes with each of them."""
    site = make_site(make_pattern(OUT, IN, K))

    def layer(x: Tensor, weight: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        return resident_linear(x, weight, bias, values, site, conv1d=False)

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    for step in range(3):
        site.stamp = step
        gradients(compiled, operands(K, False))
    assert graphs.frame_count == 1


def test_batches_of_other_lengths_share_a_graph(make_pattern, make_site) -> None:
    """One for the first, and one for all others."""
    site = make_site(make_pattern(OUT, IN, K))

    def layer(x: Tensor, weight: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        return resident_linear(x, weight, bias, values, site, conv1d=False)

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    for batch, length in [(3, 7), (5, 9), (4, 11), (2, 13)]:
        tensors = [torch.randn(batch, length, IN), *operands(K, False)[1:]]
        found, expected = gradients(compiled, tensors), gradients(layer, tensors)
        for mine, eager in zip(found[:1] + found[3:], expected[:1] + expected[3:], strict=True):
            torch.testing.assert_close(mine, eager)
    assert graphs.frame_count == 2
