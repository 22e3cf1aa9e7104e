"""What bitsandbytes and TRL would change behind one's back stays as it is."""

from __future__ import annotations

import pytest
import torch

from sft import SoRAConfig, SpielConfig
from sft.adapters.quantized import dequantised, keep_packed, packed_modules, requantised
from sft.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CONFIG = SpielConfig(density=0.05, growth="none", task_type="CAUSAL_LM")


def gradients(model, batch):
    model.train()
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def repacking_cpu(lab):
    """Skip where bitsandbytes never repacks: the CPU has no bf16 instructions."""
    _, module = next(iter(packed_modules(stock(lab))))
    if not getattr(module, "support_avx512bf16_for_cpu", False):
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 alone")


def stock(lab):
    """Load as a user without us would."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        lab.folder, dtype=torch.float32, quantization_config=config
    )


def test_an_evaluation_before_training_takes_no_gradient_away(lab):
    model = lab.adapt(lab.packed({"bits": "nf4"}), CONFIG)
    before = lab.base_bytes(model.get_base_model())
    expected = gradients(model, lab.batch())
    with torch.no_grad():
        model.eval()(**lab.batch())
    found = gradients(model, lab.batch())
    assert lab.base_bytes(model.get_base_model()) == before
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name
        assert bool(gradient.any()), name


def test_an_adapter_on_a_stock_model_keeps_its_bytes_in_evaluation(lab, repacking_cpu):
    model = lab.adapt(stock(lab), CONFIG)
    before = lab.base_bytes(model.get_base_model())
    with torch.no_grad():
        model.eval()(**lab.batch())
    assert lab.base_bytes(model.get_base_model()) == before


def test_a_model_that_was_evaluated_is_unpacked_again_and_says_so(lab, repacking_cpu, caplog):
    base = stock(lab)
    with torch.no_grad():
        base.eval()(**lab.batch())
    assert base.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu
    with caplog.at_level("WARNING", logger="sft"):
        model = lab.adapt(base, CONFIG)
    assert "4-bit weights were evaluated before" in caplog.text
    assert all(bool(g.any()) for g in gradients(model, lab.batch()).values())


FORMS = {
    "nf4": {"bits": "nf4"},
    "fp4-double": {"bits": "fp4", "double_quant": True},
    "int8": {"bits": "int8"},
}


@pytest.mark.parametrize("kind", FORMS)
def test_packing_what_was_unpacked_changes_nothing(lab, kind):
    form = FORMS[kind]
    for name, module in packed_modules(lab.packed(form)):
        stands_for = dequantised(module)
        assert stands_for.dtype == torch.float32
        assert stands_for.shape == (module.out_features, module.in_features)
        module.weight = requantised(module, stands_for)
        # scales in 8 bits are quantised from a mean of their own
        atol = 1e-3 if form.get("double_quant") else 1e-7
        torch.testing.assert_close(dequantised(module), stands_for, atol=atol, rtol=0, msg=name)


def test_rows_that_bitsandbytes_unpacks_wrongly_are_refused(lab, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(lab.folder)
    config.intermediate_size = 96
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    message = (
        r"^model\.quantization: got nf4 for 'model\.layers\.0\.mlp\.down_proj'.*\['down_proj'\]"
    )
    with pytest.raises(UserError, match=message):
        lab.packed({"bits": "nf4"}, name=str(tmp_path / "odd"))
    model = lab.packed({"bits": "nf4", "skip_modules": ["down_proj"]}, name=str(tmp_path / "odd"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "odd")
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.weight, plain.model.layers[0].mlp.down_proj.weight
    )
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("kind", FORMS)
def test_unpacked_weights_are_the_original_ones_to_the_step_of_the_code(lab, kind):
    plain = lab.reference()
    step = 1 / 127 if kind == "int8" else 0.2  # between codes, of the largest of a block
    for name, module in packed_modules(lab.packed(FORMS[kind])):
        original = plain.get_submodule(name).weight
        error = (dequantised(module) - original).abs().max()
        assert 0 < error <= step * original.abs().max(), name


def test_plain_models_are_left_alone(lab):
    model = lab.reference()
    keep_packed(model)
    assert list(packed_modules(model)) == []


@pytest.fixture
def trl_trainer(lab, tiny_tokenizer):
    def build(model, **kwargs):
        from trl import SFTConfig

        from sft.recipe.arguments import machine_defaults
        from sft.trainers.supervised import SparseSFTTrainer

        off = {k: v for k, v in machine_defaults(SFTConfig).items() if k.endswith("checkpointing")}
        arguments = SFTConfig(
            str(lab.out), use_cpu=True, bf16=False, report_to=[], save_strategy="no", max_steps=1,
            disable_tqdm=True, **off,
        )  # fmt: skip
        return SparseSFTTrainer(
            model=model, args=arguments, train_dataset=lab.rows(),
            processing_class=tiny_tokenizer, **kwargs,
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def test_trained_values_stay_float32_under_trl(lab, trl_trainer):
    model = lab.adapt(
        lab.packed({"bits": "nf4"}), SoRAConfig(r=4, task_type="CAUSAL_LM"), moved=0.1
    )
    before = lab.state(model)
    assert any(bool((t != t.bfloat16().float()).any()) for t in before.values())
    trainer = trl_trainer(model)
    after = lab.state(trainer.model)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name


def test_an_adapter_that_trl_puts_on_is_float32_as_well(lab, trl_trainer):
    trainer = trl_trainer(lab.packed({"bits": "int8"}), peft_config=CONFIG)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trained
    assert {p.dtype for p in trained} == {torch.float32}
