"""The layer of slices by itself: forms, files, dtypes, quantised bases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sft.adapters.slices.layer import SliceLinear
from sft.adapters.slices.permuted import PermutedUnits

FEATURES = torch.tensor([0, 2, 3])


@pytest.fixture
def make():
    def build(kind="linear", side="in", dtype=torch.float32, *, bias=True):
        torch.manual_seed(3)
        base = nn.Linear(6, 5, bias=bias) if kind == "linear" else Conv1D(5, 6)
        base = base.to(dtype).requires_grad_(False)
        layer = SliceLinear(base, side=side, name="", permuted=PermutedUnits(base))
        layer.add_adapter("default", FEATURES)
        layer.s2ft_values["default"].data.normal_(0, 0.1)
        return layer

    return build


KINDS = pytest.mark.parametrize("kind", ["linear", "conv1d"])
SIDES = pytest.mark.parametrize("side", ["in", "out"])


@KINDS
@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_aside_resident_and_merged_agree(make, kind, side, dtype) -> None:
    layer = make(kind, side, dtype)
    x = torch.randn(2, 4, 6).to(dtype)
    stored = layer.get_base_layer().weight.detach().clone()
    aside = layer(x)
    assert layer.s2ft_values["default"].dtype == torch.promote_types(dtype, torch.float32)
    assert layer.enter_resident() is None
    inside = layer(x)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(inside, aside, **tolerance)
    expected = (stored + layer.get_delta_weight("default")).to(dtype)
    assert torch.equal(layer.get_base_layer().weight, expected)
    layer.leave_resident()
    assert torch.equal(layer.get_base_layer().weight, stored)
    layer.merge()
    assert torch.equal(layer(x), inside)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, stored)


@KINDS
@SIDES
def test_the_delta_is_the_product_of_its_factors(make, kind, side) -> None:
    layer = make(kind, side)
    a, b = layer.low_rank("default")
    assert (a.shape, b.shape) == ((3, 6), (5, 3))
    dense = layer.get_delta_weight("default")
    assert torch.equal(b @ a, dense.t() if kind == "conv1d" else dense)


@pytest.mark.parametrize("mode", ["resident", "aside"])
@SIDES
def test_s2ft_fact04_only_the_slice_gets_a_gradient(make, side, mode) -> None:
    layer, x = make(side=side).train(), torch.randn(7, 6)
    if mode == "resident":
        layer.enter_resident()
    layer(x).square().sum().backward()
    found = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert found == {"s2ft_values.default"}
    dense = nn.Linear(6, 5)
    delta = layer.get_delta_weight("default")
    layer.leave_resident()
    dense.weight.data = layer.get_base_layer().weight + delta
    dense.bias.data = layer.get_base_layer().bias.clone()
    dense(x).square().sum().backward()
    whole = dense.weight.grad
    expected = whole[:, FEATURES].t() if side == "in" else whole[FEATURES]
    torch.testing.assert_close(layer.s2ft_values["default"].grad, expected, rtol=1e-5, atol=1e-5)


def test_no_features_leave_the_plain_layer(make) -> None:
    layer, x = make(), torch.randn(4, 6)
    layer.replace_slice("default", torch.tensor([], dtype=torch.int64))
    expected = layer.get_base_layer()(x)
    assert torch.equal(layer(x), expected)
    assert layer.enter_resident() is None
    assert torch.equal(layer(x), expected) and layer.content is None


def test_the_parameter_object_stays_when_the_slice_moves(make) -> None:
    layer, x = make(), torch.randn(4, 6)
    own = layer.s2ft_values["default"]
    layer.enter_resident()
    layer.replace_slice("default", torch.tensor([1, 2, 4, 5]))
    assert layer.s2ft_values["default"] is own and own.shape == (4, 5) and not own.any()
    own.data.fill_(0.1)
    layer.sync()
    delta = layer.get_delta_weight("default")
    assert delta[:, [1, 2, 4, 5]].all() and not delta[:, [0, 3]].any()
    resident = layer(x)
    layer.leave_resident()
    torch.testing.assert_close(resident, layer(x))


def test_a_copy_is_a_layer_of_its_own(make) -> None:
    layer, x = make(), torch.randn(4, 6)
    layer.enter_resident()
    other = copy.deepcopy(layer)
    expected = layer(x)
    with torch.no_grad():
        layer.s2ft_values["default"].zero_()
    assert torch.equal(other(x), expected)
    layer.leave_resident()
    other.leave_resident()
    assert torch.equal(layer.get_base_layer().weight, other.get_base_layer().weight)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"s2ft_indices": torch.tensor([0, 6], dtype=torch.int32)}, "position 6 is outside"),
        ({"s2ft_indices": torch.tensor([2, 0, 3], dtype=torch.int32)}, "strictly ascending"),
        ({"s2ft_indices": torch.tensor([0.0, 1, 2])}, "got torch.float32"),
        ({"s2ft_values": torch.zeros(3, 4)}, r"s2ft_values holds \(3, 4\)"),
        ({"s2ft_values": torch.zeros(2, 5)}, r"s2ft_values holds \(2, 5\)"),
        ({"s2ft_values": torch.zeros(3, 5, dtype=torch.int32)}, "allowed are float dtypes"),
        ({"s2ft_base": torch.tensor([17])}, "trained on another base weight"),
        ({"s2ft_base": torch.tensor([1, 2])}, "the file is damaged"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(make, change, message) -> None:
    layer = make()
    parts = {part: getattr(layer, part)["default"] for part in layer.file_parts("default")}
    layer.check_file("default", parts, "adapter file: x")
    with pytest.raises(ValueError, match=rf"^adapter file: x.*{message}"):
        layer.check_file("default", parts | change, "adapter file: x")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_runs_aside(bits) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 32).requires_grad_(False)
    if bits == 4:
        base = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
        base.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False)
    else:
        base = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        base.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False)
    base.bias.data = plain.bias.data
    base = base.to("cpu").requires_grad_(False)
    layer = SliceLinear(base, side="in", name="", permuted=PermutedUnits(base))
    layer.add_adapter("default", FEATURES)
    layer.s2ft_values["default"].data.normal_(0, 0.1)
    x = torch.randn(4, 64)
    try:
        expected = base(x) + x[:, FEATURES] @ layer.s2ft_values["default"]
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"this bitsandbytes can't run on a CPU: {error}")
    assert "quantised" in layer.enter_resident()
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.s2ft_values["default"].grad.any()
