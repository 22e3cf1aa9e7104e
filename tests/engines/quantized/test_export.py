"""Merging over a packed base: three ways, each with its error; none of them silent."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from sft import S2FTConfig, SLTrainConfig, SoRAConfig, SpielConfig
from sft.adapters.quantized import dequantised, keep_packed, packing
from sft.errors import UserError
from sft.export.merged import export_merged, logits_of, trained_logits
from sft.export.quantized import ERROR_FILE, export_quantized, merge_quantized, trained_weight

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
FORMS = {
    "nf4": {"bits": "nf4"},
    "fp4-double": {"bits": "fp4", "double_quant": True},
    "int8": {"bits": "int8"},
}
METHODS = {
    "spiel": SpielConfig(density=0.05, task_type="CAUSAL_LM"),
    "s2ft": S2FTConfig(density=0.1, task_type="CAUSAL_LM"),
    "sora": SoRAConfig(r=4, task_type="CAUSAL_LM"),
    "sltrain": SLTrainConfig(r=4, task_type="CAUSAL_LM"),
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
}
SIZE = 0.02


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


def dense(adapted, batch):
    """The trained model by hand: a dense twin whose weights are base plus delta."""
    return logits_of(adapted, [batch])[0]


@pytest.mark.parametrize("method", METHODS)
def test_dequantised_is_exactly_what_was_trained(lab, method):
    model = lab.adapt(lab.packed(FORMS["nf4"]), METHODS[method], moved=SIZE)
    expected = trained_logits(model, [lab.batch()])
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    delta = 0 if packing(layer) else layer.get_delta_weight("default").detach()
    base = layer if packing(layer) else layer.get_base_layer()
    wanted = dequantised(base) + delta
    merged, error = merge_quantized(model, "dequantize", [lab.batch()])
    found = merged.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=0)
    assert all(layer.largest == 0 for layer in error.layers.values())
    assert len(error.layers) == 14
    torch.testing.assert_close(logits_of(merged, [lab.batch()]), expected, atol=1e-5, rtol=0)
    assert not any(packing(module) for module in merged.modules())


@pytest.mark.parametrize("method", ["spiel", "lora"])
def test_an_adapter_that_is_off_adds_nothing(lab, method):
    model = lab.adapt(lab.packed(FORMS["nf4"]), METHODS[method], moved=SIZE)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    base, on = dequantised(layer.get_base_layer()), trained_weight(layer)
    assert not torch.equal(on, base)
    with model.disable_adapter():
        assert torch.equal(trained_weight(layer), base)
    assert torch.equal(trained_weight(layer), on)
    assert torch.equal(dequantised(layer.get_base_layer()), base), "what is read is not written to"


def test_dequantised_is_rounded_once(lab):
    model = lab.adapt(lab.packed(FORMS["nf4"], dtype="bfloat16"), METHODS["spiel"], moved=SIZE)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    wanted = trained_weight(layer)
    merged, error = merge_quantized(model, "dequantize", [lab.batch()])
    found = merged.model.layers[0].mlp.up_proj.weight
    assert found.dtype == merged.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())
    worst = error.layers["model.layers.0.mlp.up_proj"].largest
    assert worst == float((wanted.bfloat16().float() - wanted).abs().max()) > 0


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("mode", ["dequantize", "requantize", "reference"])
def test_a_folder_is_what_was_merged_and_tells_its_error(lab, kind, mode):
    model = lab.adapt(lab.packed(FORMS[kind]), METHODS["spiel"], moved=SIZE)
    expected = trained_logits(model, [lab.batch()])[0]
    layer = "model.layers.0.mlp.up_proj"
    trained = trained_weight(model.get_base_model().get_submodule(layer))
    folder = lab.out / "merged"
    difference, error = export_quantized(
        model, NoTokenizer(), folder, mode, [lab.batch()], reference=lab.reference
    )
    assert difference == 0  # the folder, reloaded, against the merged model in memory
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    keep_packed(reloaded)
    module = reloaded.get_submodule(layer)
    packed = packing(module)
    assert packed == (FORMS[kind]["bits"] if mode == "requantize" else None)
    off = (logits_of(reloaded, [lab.batch()])[0] - expected).abs()
    assert error.logits.largest == pytest.approx(float(off.max()), abs=1e-6)
    assert error.logits.mean == pytest.approx(float(off.mean()), abs=1e-6)
    kept = dequantised(module) if packed else module.weight.detach()
    assert error.layers[layer].largest == pytest.approx(float((kept - trained).abs().max()))
    written = json.loads((folder / ERROR_FILE).read_text())
    assert written["mode"] == mode
    assert written["layers"].keys() == error.layers.keys()
    assert all(mode in line for line in error.lines())
    if mode != "dequantize":
        assert min(layer.mean for layer in error.layers.values()) > 0


@pytest.mark.parametrize("mode", ["dequantize", "reference"])
def test_16_bit_models_keep_the_frequencies_of_their_rotary_embeddings(lab, mode):
    """They are computed when a model loads, in float32 whatever its weights are."""
    model = lab.adapt(lab.packed(FORMS["nf4"], dtype="bfloat16"), METHODS["spiel"], moved=SIZE)
    merged, _ = merge_quantized(model, mode, [lab.batch()], reference=lab.reference)
    assert merged.dtype == torch.bfloat16
    found, wanted = merged.model.rotary_emb, lab.reference().model.rotary_emb
    assert torch.equal(found.inv_freq, wanted.inv_freq)


@pytest.mark.parametrize("method", ["spiel", "s2ft", "lora"])
def test_the_reference_gets_the_delta_on_its_own_weights(lab, method):
    model = lab.adapt(lab.packed(FORMS["nf4"]), METHODS[method], moved=SIZE)
    model.save_pretrained(lab.out / "adapter")
    merged, _ = merge_quantized(model, "reference", [lab.batch()], reference=lab.reference)
    direct = PeftModel.from_pretrained(lab.reference(), lab.out / "adapter").merge_and_unload()
    for name, parameter in direct.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name)), name


def test_small_deltas_are_lost_in_packing_anew_and_the_error_says_so(lab):
    nothing = lab.adapt(lab.packed(FORMS["nf4"]), METHODS["spiel"])
    _, none = merge_quantized(nothing, "requantize", [lab.batch()])
    assert none.logits.largest < 1e-5
    model = lab.adapt(lab.packed(FORMS["nf4"]), METHODS["spiel"], moved=1e-3)
    base = logits_of(lab.packed(FORMS["nf4"]), [lab.batch()])[0]
    trained = trained_logits(model, [lab.batch()])[0]
    merged, error = merge_quantized(model, "requantize", [lab.batch()])
    moved = float((trained - base).abs().mean())
    assert error.logits.mean > 0.5 * moved  # most of what was learnt
    assert float((logits_of(merged, [lab.batch()])[0] - trained).abs().mean()) == pytest.approx(
        error.logits.mean, abs=1e-7
    )


def test_nothing_is_merged_into_a_packed_base_silently(lab):
    model = lab.adapt(lab.packed(FORMS["nf4"]), METHODS["spiel"], moved=SIZE)
    before = lab.base_bytes(model.get_base_model())
    with pytest.raises(ValueError, match=r"quantised.*sft\.export\.quantized\.merge_quantized"):
        model.merge_adapter()
    stock = lab.adapt(lab.packed(FORMS["nf4"]), METHODS["lora"], moved=SIZE)
    for adapted in (model, stock):
        with pytest.raises(UserError, match="merged: the base is packed in 4 or 8 bits"):
            export_merged(adapted, NoTokenizer(), lab.out / "merged")
    assert lab.base_bytes(model.get_base_model()) == before
    assert not (lab.out / "merged").exists()


REFUSED = {
    "an-unknown-mode": ({"mode": "half"}, "quantized: got 'half'; expected one of dequantize"),
    "no-reference": ({"mode": "reference"}, "there is no base in 16 or 32 bit to merge into"),
    "a-dtype-of-packed": ({"mode": "requantize", "dtype": torch.float16}, "dtype: is of dense"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(lab, name):
    settings, message = REFUSED[name]
    model = lab.adapt(lab.packed(FORMS["nf4"]), METHODS["spiel"])
    with pytest.raises(UserError, match=message):
        merge_quantized(model, batches=[lab.batch()], **settings)


def test_a_packed_base_is_no_reference(lab):
    model = lab.adapt(lab.packed(FORMS["nf4"]), METHODS["spiel"])
    with pytest.raises(UserError, match="no base in 16 or 32 bit"):
        merge_quantized(
            model, "reference", [lab.batch()], reference=lambda: lab.packed(FORMS["int8"])
        )


def test_a_delta_that_is_no_sum_is_refused_with_the_way_that_works(lab):
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = lab.adapt(lab.packed(FORMS["nf4"]), dora)
    with pytest.raises(UserError, match="take quantized=reference"):
        merge_quantized(model, "dequantize", [lab.batch()])


def test_conv1d_comes_back_as_it_was(lab, gpt2):
    gpt2(n_embd=64).save_pretrained(lab.out / "gpt2")
    base = lab.packed(FORMS["nf4"], name=str(lab.out / "gpt2"))
    config = SpielConfig(density=0.05, target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = lab.adapt(base, config, moved=SIZE)
    model.save_pretrained(lab.out / "adapter")
    batch = {"input_ids": lab.batch()["input_ids"]}
    again = AutoModelForCausalLM.from_pretrained(lab.out / "gpt2")
    with pytest.raises(UserError, match=r"is a Linear4bit where.* a Conv1D in the reference"):
        merge_quantized(model, "reference", [batch], reference=lambda: again)
    difference, error = export_quantized(
        model, NoTokenizer(), lab.out / "merged", "dequantize", [batch]
    )
    assert difference == 0
    assert error.logits.largest < 1e-5
