"""The layer and the tuner around it: several adapters, exact merges, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sft
from sft import SpielConfig
from sft.adapters.deltas.layer import DeltaLayer
from sft.adapters.layer import sparse_layers

KINDS = ["linear", "conv1d", "embedding"]


def inputs(kind: str) -> torch.Tensor:
    if kind == "embedding":
        return torch.tensor([[0, 3, 5], [5, 1, 2]])
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(3))


def add_other(layer: DeltaLayer) -> None:
    """A second adapter whose positions overlap with those of the first."""
    indices = layer.delta_indices["default"].long()
    free = torch.tensor([j for j in range(30) if j not in indices.tolist()])[:3]
    both = torch.cat([indices[:4], free]).sort().values
    layer.add_adapter("other", both, torch.randn(len(both)) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_several_active_adapters_add_up(make_layer, kind) -> None:
    layer, x = make_layer(kind), inputs(kind)
    add_other(layer)
    bare = layer.get_base_layer()(x)
    parts = []
    for name in ("default", "other"):
        layer.set_adapter(name)
        parts.append(layer(x) - bare)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x) - bare, sum(parts), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", [False, True])
def test_fact28_fact29_fact30_merges_are_exact(make_layer, kind, dtype, reference) -> None:
    layer, x = make_layer(kind, dtype=dtype, reference=reference), inputs(kind)
    x = x if kind == "embedding" else x.to(dtype)
    weight = layer.get_base_layer().weight
    before = weight.clone()
    with sft.resident(layer):
        resident = layer(x).detach()
    layer.merge()
    assert layer.merged and not torch.equal(weight, before)
    assert torch.equal(layer(x), resident)
    assert (weight.requires_grad, weight.is_leaf, weight.grad_fn) == (False, True, None)
    assert layer.get_base_layer().weight is weight
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(weight, before)


def test_fact29_overlapping_merges_undo_in_reverse(make_layer) -> None:
    layer, x = make_layer("linear", dtype=torch.bfloat16), inputs("linear").bfloat16()
    add_other(layer)
    weight = layer.get_base_layer().weight
    before = weight.clone()
    layer.merge(adapter_names=["default", "other"])
    both = weight.clone()
    assert layer.merged_adapters == ["default", "other"]
    layer.unmerge()
    assert torch.equal(weight, before)
    layer.merge(adapter_names=["default"])
    first = weight.clone()
    with pytest.warns(UserWarning, match="additionally merging other"):
        layer.merge(adapter_names=["default", "other"])
    assert torch.equal(weight, both) and not torch.equal(first, both)
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge(adapter_names=["default", "other"])
    assert torch.equal(weight, both)
    layer(x)
    layer.unmerge()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("how", ["moved", "loaded"])
def test_fact29_a_support_that_changed_while_merged(make_layer, how) -> None:
    layer = make_layer("linear")
    weight = layer.get_base_layer().weight
    before = weight.clone()
    layer.merge()
    old = layer.delta_indices["default"].long()
    free = torch.tensor([j for j in range(30) if j not in old.tolist()])[:9]
    if how == "moved":
        layer.replace_support("default", free, torch.full((9,), -1))
    else:
        layer.load_state_dict({"delta_indices.default": free}, strict=False)
    layer.unmerge()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fact29_cast_between_merge_and_unmerge(make_layer, dtype) -> None:
    layer = make_layer("linear")
    expected = layer.get_base_layer().weight.to(dtype)
    layer.merge()
    layer.to(dtype)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, expected)


def test_disabling_takes_a_merge_out(make_layer) -> None:
    layer, x = make_layer("linear"), inputs("linear")
    before, bare = layer.get_base_layer().weight.clone(), layer.get_base_layer()(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), bare)
    assert torch.equal(layer.get_base_layer().weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(make_layer, value) -> None:
    layer = make_layer("linear")
    weight = layer.get_base_layer().weight
    before = weight.clone()
    layer.delta_values["default"].data[3] = value
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(weight, before) and not layer.merged


def quantised() -> nn.Linear:
    base = nn.Linear(6, 5)
    base.weight = nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)
    return base


def test_a_quantised_merge_is_refused() -> None:
    layer = DeltaLayer(quantised())
    layer.add_adapter("default", torch.tensor([1, 4]), torch.ones(2))
    with pytest.raises(ValueError, match=r"merge: the base weight is torch\.int8 \(quantised\)"):
        layer.merge()
    assert (layer.get_base_layer().weight == 1).all() and not layer.merged


def test_a_merge_into_8_bit_floats_is_refused() -> None:
    """Their scales lie beside them, and a delta would have to be divided by these."""
    base = nn.Linear(6, 5)
    base.weight = nn.Parameter(torch.ones(5, 6).to(torch.float8_e4m3fn), requires_grad=False)
    layer = DeltaLayer(base)
    layer.add_adapter("default", torch.tensor([1, 4]), torch.ones(2))
    with pytest.raises(ValueError, match=r"merge: the base weight is torch\.float8_e4m3fn \(quan"):
        layer.merge()


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_delta(make_layer, kind) -> None:
    layer = make_layer(kind)
    dense = layer.get_delta_weight("default")
    where = layer.delta_indices["default"].long()
    assert dense.shape == layer.get_base_layer().weight.shape
    assert torch.equal(dense.flatten()[where], layer.delta_values["default"].detach())
    assert dense.count_nonzero() == 9


def test_an_empty_support_trains_nothing_and_works(make_layer) -> None:
    layer, x = make_layer("linear", k=0), inputs("linear")
    expected = layer.get_base_layer()(x)
    assert torch.equal(layer(x), expected)
    with sft.resident(layer):
        layer(x).sum().backward()
    assert layer.delta_values["default"].grad.numel() == 0


def test_a_trained_bias_beside_frozen_weights(make_layer) -> None:
    layer, x = make_layer("linear"), inputs("linear")
    bias = layer.get_base_layer().bias.requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), bias)
    with sft.resident(layer):
        (found,) = torch.autograd.grad(layer(x).square().sum(), bias)
    torch.testing.assert_close(found, expected)


def test_padding_rows_stay_untrained_in_both_modes(make_layer) -> None:
    layer, ids = make_layer("embedding", k=30), torch.tensor([3, 3, 1])
    gradients = []
    for mode in ("aside", "resident"):
        gradients += torch.autograd.grad(layer(ids).sum(), layer.delta_values["default"])
        assert gradients[-1].nonzero().flatten().tolist() == [5, 6, 7, 8, 9], mode
        layer.enter_resident()
    assert torch.equal(*gradients)


# -- targets ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_tied_weights_are_refused_by_name(llama, spiel) -> None:
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(ValueError, match=rf"target_modules: '.*{target}' shares its weight wi"):
            spiel(llama(tie_word_embeddings=True), target_modules=[target])


def test_modules_that_are_not_linear_are_refused_by_name(spiel) -> None:
    with pytest.raises(ValueError, match=r"'model\.norm' is a LlamaRMSNorm, allowed are nn\.Lin"):
        spiel(target_modules=["model.norm"])


def test_a_matrix_without_a_weight_is_refused(spiel) -> None:
    with pytest.raises(ValueError, match=r"leave none for \d+ matrices"):
        spiel(num_weights=5)


def test_default_targets_are_all_linear_layers_but_the_head(spiel) -> None:
    names = set(spiel().base_model.adapted_layers("default"))
    assert len(names) == 14 and all(name.endswith("_proj") for name in names)


def test_targets_and_exclusions(spiel) -> None:
    model = spiel(
        target_modules=r".*\.(q_proj|k_proj)", exclude_modules=["layers.0.self_attn.q_proj"]
    )
    assert sorted(model.base_model.adapted_layers("default")) == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.q_proj",
    ]


@pytest.mark.parametrize("mode", ["aside", "resident"])
def test_conv1d_and_embeddings_in_a_model(gpt2, spiel, batch, randomize, mode) -> None:
    model = spiel(gpt2(), target_modules=["c_attn", "c_fc", "wte"])
    randomize(model)
    dense = gpt2()
    with torch.no_grad():
        for name, layer in model.base_model.adapted_layers("default").items():
            dense.get_submodule(name).weight += layer.get_delta_weight("default")
    loss = dense(**batch).loss
    loss.backward()
    if mode == "resident":
        with sft.resident(model):
            mine = model(**batch).loss
            mine.backward()
    else:
        mine = model(**batch).loss
        mine.backward()
    torch.testing.assert_close(mine, loss)
    kinds = set()
    for name, layer in model.base_model.adapted_layers("default").items():
        kinds.add(layer.kind.value)
        where = layer.delta_indices["default"].long()
        expected = dense.get_submodule(name).weight.grad.flatten()[where]
        found = layer.delta_values["default"].grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert kinds == {"conv1d", "embedding"}


def test_double_precision_bases_train_double_deltas(llama, spiel) -> None:
    for base, deltas in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        layers = sparse_layers(spiel(llama().to(base))).values()
        assert {layer.delta_values["default"].dtype for layer in layers} == {deltas}


def test_the_configuration_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="density: got 0, allowed"):
        SpielConfig(density=0)
    assert SpielConfig().density == 0.005
    assert SpielConfig(num_weights=3).density is None


def test_a_merge_into_a_weight_that_is_not_contiguous_is_refused(make_layer) -> None:
    layer = make_layer("linear")
    weight = layer.get_base_layer().weight
    weight.data = weight.data.t().contiguous().t()
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"^merge: the base weight of shape .* not contiguous"):
        layer.merge()
    assert torch.equal(weight, before)
