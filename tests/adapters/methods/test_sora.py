"""SoRA in a model, driven by hand: counts, gates, ranks that leave, files with fewer ranks."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sft import SoRAConfig
from sft.adapters.gates.layer import GatedLinear
from sft.kernels.gated_linear import gated_linear_reference
from sft.optim.adamw import SparseAdamW
from sft.optim.move import move_state


@pytest.fixture
def sora(llama):
    def build(base=None, **fields):
        config = SoRAConfig(task_type="CAUSAL_LM", **{"r": 4, "alpha": 8, **fields})
        return get_peft_model(llama() if base is None else base, config)

    return build


def layers_of(model, adapter="default"):
    return model.base_model.adapted_layers(adapter)


def close_gates(model, share=0.5, seed=3) -> int:
    """Set a random share of the gates to 0; return how many are left open."""
    generator = torch.Generator().manual_seed(seed)
    left = 0
    with torch.no_grad():
        for layer in layers_of(model).values():
            gate = layer.sora_gate["default"]
            gate[torch.rand(gate.shape, generator=generator) < share] = 0
            left += int(gate.count_nonzero())
    return left


def compact(model, optimizer=None, step=1):
    """Let all ranks leave whose gate is 0 now."""
    tuner = model.base_model
    tuner.peft_config["default"].compact_after = step
    changes = tuner.dynamics("default", 100).after_update(step, lambda _: None)
    for change in changes if optimizer else []:
        move_state(optimizer, change.parameter, change.source, dim=change.dim)
    return changes


def ranks(model) -> list[int]:
    return [len(layer.sora_gate["default"]) for layer in layers_of(model).values()]


def optimizer_of(model, lr=1e-2):
    return SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


# -- counts ------------------------------------------------------------------------------------


def count(base, targets, r) -> tuple[int, int]:
    model = get_peft_model(base, SoRAConfig(target_modules=targets, r=r))
    layers = layers_of(model).values()
    factors = sum(
        layer.sora_A["default"].numel() + layer.sora_B["default"].numel() for layer in layers
    )
    return factors, sum(layer.sora_gate["default"].numel() for layer in layers)


def test_s11_deberta_v3_base_has_the_papers_count() -> None:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, relative_attention=True, pos_att_type=["p2c", "c2p"],
        share_att_key=True, position_buckets=256,
    )  # fmt: skip
    with torch.device("meta"):
        base = DebertaV2ForSequenceClassification(config)
    targets = r".*encoder\.layer\.\d+\..*(query_proj|key_proj|value_proj|dense)"
    assert count(base, targets, 8) == (1_327_104, 12 * 6 * 8)


def test_s11_llama_7b_has_the_count_of_its_shapes() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    per_rank = 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert count(base, "all-linear", 8) == (8 * per_rank, 32 * 7 * 8)


def test_s11_what_is_counted_after_pruning_is_the_sum_over_the_ranks(sora) -> None:
    model = sora()
    close_gates(model)
    compact(model)
    expected = sum(
        r * (layer.in_features + layer.out_features + 1)
        for r, layer in zip(ranks(model), layers_of(model).values(), strict=True)
    )
    assert model.get_nb_trainable_parameters()[0] == expected


# -- the layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layer_is_base_plus_gated_product(kind, dtype) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6)
    layer = GatedLinear(base.to(dtype).requires_grad_(False))
    wide = torch.promote_types(dtype, torch.float32)
    a, b, gate = (torch.randn(size, dtype=wide) for size in ((3, 6), (5, 3), (3,)))
    gate[1] = 0
    layer.add_adapter("default", a, b, gate, scale=1.5)
    layer.set_adapter("default")
    x = torch.randn(2, 4, 6, dtype=dtype)
    operands = [tensor.to(wide) for tensor in (x, base.weight, base.bias)]
    exact = gated_linear_reference(*operands, a, b, gate, 1.5, conv1d=kind == "conv1d")
    tolerance = {"rtol": 1e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(layer(x).to(wide), exact, check_dtype=False, **tolerance)
    # the slow way, taken where another layer or a hook lies between
    handle = base.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(x).to(wide), exact, check_dtype=False, **tolerance)
    handle.remove()
    factors = layer.low_rank("default")
    assert factors[0].shape == (2, 6) and factors[1].dtype == wide
    delta = factors[1] @ factors[0]
    stored = delta.t() if kind == "conv1d" else delta
    torch.testing.assert_close(layer.get_delta_weight("default"), stored)
    before = base.weight.clone()
    layer.merge()
    assert base.weight.dtype == dtype
    torch.testing.assert_close(base.weight, (before + stored).to(dtype))
    torch.testing.assert_close(layer(x).to(wide), exact, check_dtype=False, **tolerance)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_dropout_reaches_the_low_rank_product_alone_and_only_in_training(sora, batch) -> None:
    model = sora(dropout=0.5, init_weights=False)
    still = model(**batch).logits
    assert torch.equal(model(**batch).logits, still)
    model.train()
    torch.manual_seed(1)
    one, other = model(**batch).logits, model(**batch).logits
    assert not torch.equal(one, other)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.sora_gate["default"].zero_()
    with model.disable_adapter():
        bare = model(**batch).logits
    torch.testing.assert_close(model(**batch).logits, bare)


def test_embeddings_are_refused(llama) -> None:
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' is a Embedding, allowed"):
        get_peft_model(llama(), SoRAConfig(target_modules=["embed_tokens"]))


def test_gates_start_normal_or_at_a_number(sora) -> None:
    gates = torch.cat([layer.sora_gate["default"] for layer in layers_of(sora(r=64)).values()])
    assert 0.7 < gates.abs().mean() < 0.9 and gates.dtype == torch.float32
    for layer in layers_of(sora(gate_init=0.5)).values():
        assert (layer.sora_gate["default"] == 0.5).all()
        assert not layer.sora_B["default"].any()
        assert layer.sora_A["default"].abs().max() <= layer.in_features**-0.5


# -- what a method asks of a run ----------------------------------------------------------------


def test_gates_have_a_group_of_their_own_without_decay(sora) -> None:
    tuner = sora(gate_learning_rate=0.3).base_model
    (group,) = tuner.parameter_groups("default", 0.1)
    assert group["lr"] == 0.3 and group["weight_decay"] == 0
    gates = [layer.sora_gate["default"] for layer in tuner.adapted_layers("default").values()]
    assert all(a is b for a, b in zip(group["params"], gates, strict=True))
    assert sora().base_model.parameter_groups("default", 0.1)[0]["lr"] == 0.1


def test_the_penalty_is_the_one_that_stages_steer(sora) -> None:
    fields = {"strength": 0.0, "last_strength": 0.6, "num_stages": 3, "prox": "reference"}
    tuner = sora(threshold="absolute", **fields).base_model
    (alone,) = tuner.penalties("default")
    assert (alone.strength, alone.rule, alone.times_lr) == (0, "reference", False)
    dynamics = tuner.dynamics("default", 9)
    (steered,) = tuner.penalties("default")
    seen = []
    for step in range(9):
        dynamics.before_update(step, 1)
        seen.append(steered.strength)
    assert seen == [0] * 3 + [0.3] * 3 + [0.6] * 3
    assert tuner.dynamics("default", 9).penalty is tuner.penalties("default")[0] is not steered


def test_the_loss_term_is_the_mean_gate_and_ignores_what_left(sora) -> None:
    model = sora(l1=3.0)
    assert sora().base_model.loss_terms("default") is None
    open_gates = close_gates(model)
    gates = torch.cat([layer.sora_gate["default"] for layer in layers_of(model).values()])
    expected = 3.0 * gates.abs().mean()
    term = model.base_model.loss_terms("default")
    torch.testing.assert_close(term, expected)
    compact(model)
    assert sum(ranks(model)) == open_gates
    torch.testing.assert_close(model.base_model.loss_terms("default"), expected)


# -- ranks that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_s12_compaction_changes_neither_output_nor_the_next_update(sora, batch, share) -> None:
    models = [sora(init_weights=False), sora(init_weights=False)]
    optimizers = [optimizer_of(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        model.train()
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        close_gates(model, share)
    whole, few = models
    before, layers = few(**batch).logits, layers_of(few)
    kept = {n: layer.sora_gate["default"].nonzero().flatten() for n, layer in layers.items()}
    compact(few, optimizers[1])
    assert min(ranks(few)) == 0 if share > 0.9 else sum(ranks(few)) < sum(ranks(whole))
    torch.testing.assert_close(few(**batch).logits, before, rtol=1e-6, atol=1e-6)
    for model, optimizer in zip(models, optimizers, strict=True):
        model(**batch).loss.backward()
        optimizer.step()
    for name, one in layers_of(whole).items():
        other = layers_of(few)[name]
        assert len(kept[name]) == len(other.sora_gate["default"])
        for part, dim in (("sora_A", 0), ("sora_B", 1), ("sora_gate", 0)):
            truth = getattr(one, part)["default"].index_select(dim, kept[name])
            torch.testing.assert_close(getattr(other, part)["default"], truth, rtol=1e-5, atol=1e-6)


def test_only_gates_that_stayed_closed_leave(sora) -> None:
    model = sora(compact_after=3)
    dynamics = model.base_model.dynamics("default", 100)
    gates = [layer.sora_gate["default"] for layer in layers_of(model).values()]
    with torch.no_grad():
        gates[0][0] = gates[0][1] = gates[1][2] = 0
    assert dynamics.after_update(1, None) == []
    with torch.no_grad():
        gates[0][1] = 1.0
    assert dynamics.after_update(2, None) == []
    with torch.no_grad():
        gates[0][1] = 0.0
    changes = dynamics.after_update(3, None)
    assert ranks(model)[:3] == [3, 3, 4]
    assert [change.source.tolist() for change in changes] == [[1, 2, 3]] * 3 + [[0, 1, 3]] * 3
    assert [change.dim for change in changes] == [0, 1, 0] * 2
    for step in (4, 5):
        assert dynamics.after_update(step, None) == []
    assert dynamics.after_update(6, None) and ranks(model)[:3] == [2, 3, 4]


def test_the_last_ranks_of_a_model_do_not_leave(sora, caplog) -> None:
    model = sora()
    close_gates(model, share=2.0)
    assert compact(model) == []
    assert set(ranks(model)) == {4} and "lower the strength" in caplog.text


def test_the_log_tells_how_many_ranks_are_open(sora) -> None:
    model = sora(strength=0.7)
    left = close_gates(model)
    total = 4 * len(layers_of(model))
    dynamics = model.base_model.dynamics("default", 10)
    expected = {
        "sora_strength": 0.7,
        "sora_ranks": left,
        "sora_mean_rank": left / len(layers_of(model)),
        "sora_zero_gates": 1 - left / total,
    }
    assert dynamics.metrics() == expected
    compact(model)
    assert model.base_model.dynamics("default", 10).metrics() == expected


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_compacted_adapter_saves_and_loads(sora, llama, batch, tmp_path, low_memory) -> None:
    model = sora(init_weights=False)
    close_gates(model, share=0.8)
    compact(model)
    model.save_pretrained(tmp_path)
    assert 0 in ranks(model)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory)
    assert ranks(loaded) == ranks(model)
    # tensors read in place lie where they lie in the file: BLAS may round otherwise there
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    # back to all ranks: a plain state dict of another size
    whole = sora(init_weights=False)
    few = sora(init_weights=False)
    few.load_state_dict(model.state_dict())
    assert ranks(few) == ranks(model)
    few.load_state_dict(whole.state_dict())
    assert torch.equal(few(**batch).logits, whole(**batch).logits)


def test_a_file_of_more_ranks_is_refused_before_anything_changes(sora, llama, tmp_path) -> None:
    sora(r=6).save_pretrained(tmp_path)
    model = sora(r=4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    with pytest.raises(ValueError, match=r"sora_A holds torch.float32 \(6, 32\), allowed are"):
        set_peft_model_state_dict(model, load_peft_weights(str(tmp_path), device="cpu"))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"^r: got 0, allowed is a whole number of at least 1"),
        ({"r": True}, r"^r: got True"),
        ({"alpha": 0}, r"^alpha: got 0, allowed is a number above 0"),
        ({"dropout": 1.0}, r"^dropout: got 1.0, allowed is a number in \[0, 1\)"),
        ({"strength": -0.1}, r"^strength: got -0.1, allowed is a number of at least 0"),
        ({"strength": []}, r"^strength: got \[\]"),
        ({"strength": [0.1, float("nan")]}, r"^strength: got \[0.1, nan\]"),
        ({"strength": [0, 1], "num_stages": 2}, r"^num_stages: got 2, allowed is 1 where"),
        ({"strength": [0, 1], "last_strength": 2.0}, r"^last_strength: got 2.0, allowed is null"),
        ({"num_stages": 3}, r"^last_strength: got None, allowed is given together"),
        ({"last_strength": 1.0}, r"^last_strength: got 1.0, allowed is given together"),
        ({"num_stages": 0}, r"^num_stages: got 0"),
        ({"first_stage_share": 1.0}, r"^first_stage_share: got 1.0"),
        ({"first_stage_share": 0.5}, r"^first_stage_share: got 0.5, allowed is null for one stage"),
        ({"strength_path": "cubic"}, r"^strength_path: got 'cubic'"),
        ({"strength_path": "geometric"}, r"^strength_path: got 'geometric', allowed is 'linear'"),
        ({"strength": [0.1, 1], "strength_path": "geometric"}, r"^strength_path: got 'geometric'"),
        ({"l1": -1}, r"^l1: got -1"),
        ({"prox": "hard"}, r"^prox: got 'hard', allowed is soft or reference"),
        ({"threshold": "mean"}, r"^threshold: got 'mean', allowed is lr or absolute"),
        ({"gate_init": 0}, r"^gate_init: got 0, allowed is 'normal' or a number other than 0"),
        ({"gate_init": "uniform"}, r"^gate_init: got 'uniform'"),
        ({"gate_learning_rate": 0.0}, r"^gate_learning_rate: got 0.0"),
        ({"compact_after": 0}, r"^compact_after: got 0"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SoRAConfig(**fields)
    assert "\n" not in str(caught.value)


def test_strengths_of_the_stages() -> None:
    assert SoRAConfig(strength=0.4).strengths() == [0.4]
    assert SoRAConfig(strength=[0, 0.5, 0.1]).strengths() == [0, 0.5, 0.1]
    fields = {"num_stages": 3, "last_strength": 0.9, "strength_path": "geometric"}
    torch.testing.assert_close(
        torch.tensor(SoRAConfig(strength=0.1, **fields).strengths()), torch.tensor([0.1, 0.3, 0.9])
    )
