"""S2FT inside mixtures of experts: Mixtral's layout, and gpt_oss's transposed one with biases."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import sft
from sft.adapters.resident import enter_resident
from sft.adapters.slices.experts import SliceExperts

TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**TINY))


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**TINY, head_dim=8))


@pytest.fixture(params=[mixtral, gpt_oss], ids=["mixtral", "gpt_oss"])
def base(request):
    def build():
        torch.manual_seed(0)
        model = request.param().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bias" in name or "experts" in name:
                    parameter.normal_(std=0.3)
        return model

    return build


def adapted(base, **settings):
    settings = {"ratio": 0.25, "roles": ["o", "down"], "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(base, sft.S2FTConfig(**settings))


def experts(model) -> list[SliceExperts]:
    return [module for module in model.modules() if isinstance(module, SliceExperts)]


def test_attaching_changes_no_output(base, batch) -> None:
    model = adapted(base())
    assert len(experts(model)) == 2
    expected = base()(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    with sft.resident(model):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_dense_ones_gathered(base, batch, randomize) -> None:
    model = adapted(base())
    randomize(model)
    dense = adapted(base())
    dense.load_state_dict(model.state_dict())
    dense = dense.merge_and_unload().requires_grad_()
    dense(**batch).loss.backward()
    for resident in (False, True):
        if resident:
            with sft.resident(model):
                model(**batch).loss.backward()
        else:
            model(**batch).loss.backward()
        for name, layer in model.base_model.adapted_layers("default").items():
            if isinstance(layer, SliceExperts):
                region = layer.lines(layer.s2ft_indices["default"])
                expected = region.read(dense.get_submodule(name).down_proj.grad)
                found = layer.s2ft_values["default"].grad
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
                assert found.any()
        model.zero_grad(set_to_none=True)


def test_only_the_trained_channels_of_each_experts_tokens_are_saved(base) -> None:
    layer = experts(adapted(base()))[0]
    layer.enter_resident()
    tokens, hidden = 10, 32
    x = torch.randn(tokens, hidden)
    index = torch.randint(4, (tokens, 2))
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, index, torch.rand(tokens, 2))
    region = layer.lines(layer.s2ft_indices["default"])
    per_expert = torch.bincount(region.experts, minlength=4)
    expected = sum(int(per_expert[e]) for e in index.flatten().tolist())
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = [t for t in saved if t.untyped_storage().data_ptr() not in weights]
    # beside them the multiplication by the routing weights keeps one number a pair
    assert sum(t.numel() for t in kept if t.dim() == 2 and t.shape[1] != 1) == expected


def test_merging_is_resident_and_undone_bit_for_bit(base, batch, randomize) -> None:
    model = adapted(base())
    randomize(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "s2ft" not in n}
    with sft.resident(model):
        resident = model(**batch).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, resident, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    after = {n: p for n, p in model.named_parameters() if "s2ft" not in n}
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(**batch).logits, resident, rtol=1e-5, atol=1e-5)


def test_a_saved_adapter_is_the_one_loaded(base, batch, randomize, tmp_path) -> None:
    model = adapted(base())
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_weights_score_channels_of_each_expert(base) -> None:
    model = base()
    layer = model.model.layers[0].mlp.experts
    with torch.no_grad():
        layer.down_proj.normal_(std=0.1)
        line = layer.down_proj[2, 5] if layer.is_transposed else layer.down_proj[2, :, 5]
        line.fill_(9.0)
    chosen = experts(
        adapted(
            model, selection="weight", selection_order="largest", ratio={"o": 0.1, "down": 0.01}
        )
    )[0]
    assert 2 * 24 + 5 in chosen.s2ft_indices["default"].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "permuted"}, "^layout: .*'index'"),
        ({"roles": ["up"]}, "^roles: got 'up'.*experts"),
        ({"selection": "activation"}, "^selection: got 'activation'.*experts"),
    ],
)
def test_what_experts_cannot_do_is_refused(base, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(base(), **settings)


def test_no_tokens(base) -> None:
    layer = experts(adapted(base()))[0]
    x, chosen, weights = torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert layer(x, chosen, weights).shape == (0, 32)


def test_rows_with_their_own_adapters_are_refused(base, batch) -> None:
    model = adapted(base()).eval()
    with pytest.raises(ValueError, match=r"^adapter_names: experts see tokens"):
        model(input_ids=batch["input_ids"], adapter_names=["default"] * 3)


@pytest.mark.parametrize("resident", [False, True])
def test_kept_inputs_draw_as_many_numbers_with_gradients_as_without(base, batch, resident) -> None:
    """So that reentrant checkpointing recomputes a dropout that follows as it was."""
    model, states = adapted(base(), saved_inputs="int8").train(), []
    if resident:
        enter_resident(model)
    for gradients in (False, True):
        torch.manual_seed(0)
        with torch.set_grad_enabled(gradients):
            model(**batch)
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    assert not torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(*states)
