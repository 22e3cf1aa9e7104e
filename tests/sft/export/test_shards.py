"""Merging weight by weight: the bits of a merge in memory, a shard at a time."""

from __future__ import annotations

import gc
import json

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

import sft
from sft.errors import UserError
from sft.export.adapter import export_adapter
from sft.export.adapter_weights import AdapterWeights, WholeModelNeededError
from sft.export.forms import Request, export
from sft.export.shards import write_shards

TASK = {"task_type": "CAUSAL_LM"}
METHODS = {
    "spiel": lambda: sft.SpielConfig(density=0.1, **TASK),
    "s2ft": lambda: sft.S2FTConfig(density=0.1, **TASK),
    "sora": lambda: sft.SoRAConfig(r=4, **TASK),
    "sltrain": lambda: sft.SLTrainConfig(r=4, **TASK),
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", **TASK),
    "dora": lambda: LoraConfig(r=4, target_modules="all-linear", use_dora=True, **TASK),
    "head": lambda: sft.SpielConfig(density=0.1, modules_to_save=["lm_head"], **TASK),
    "embedding": lambda: sft.SpielConfig(density=0.1, modules_to_save=["embed_tokens"], **TASK),
}


def whole(base, adapter) -> dict[str, torch.Tensor]:
    """Merge in memory, as PEFT does."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged = model.merge_and_unload()
    merged.save_pretrained(base.parent / "whole")
    return load_file(base.parent / "whole/model.safetensors")


def written(folder) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("method", METHODS)
def test_weight_by_weight_gives_the_bits_of_a_merge_in_memory(
    byte_base, adapter_on, tmp_path, method
) -> None:
    adapter = adapter_on(byte_base, METHODS[method]())
    said: list[str] = []
    difference = export_adapter(
        adapter, base=None, to=tmp_path / "out", max_shard_size="40KB", say=said.append
    )
    expected, found = whole(byte_base, adapter), written(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and said == [f"merged weight by weight into {len(files)} files"]
    assert difference is not None and difference < 1e-5
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    tied = method not in ("head", "embedding")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] == tied == ("lm_head.weight" not in found)
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_layers_of_gpt2_and_16_bits(byte_tokenizer, adapter_on, tmp_path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "base")
    byte_tokenizer.save_pretrained(tmp_path / "base")
    transposed = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, **TASK)
    configs = {name: METHODS[name]() for name in ("spiel", "s2ft", "sora")} | {"lora": transposed}
    for method, settings in configs.items():
        adapter = adapter_on(tmp_path / "base", settings, name=method)
        to = tmp_path / f"{method}-out"
        export_adapter(adapter, base=None, to=to, say=lambda _: None)
        expected, found = whole(tmp_path / "base", adapter), written(to)
        assert {t.dtype for t in found.values()} == {torch.bfloat16}
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_cast_is_that_of_the_merged_weights(byte_base, adapter_on, tmp_path) -> None:
    adapter = adapter_on(byte_base, METHODS["spiel"]())
    assert export_adapter(adapter, base=None, to=tmp_path / "out", dtype="float16") == 0
    expected, found = whole(byte_base, adapter), written(tmp_path / "out")
    assert all(torch.equal(expected[name].half(), found[name]) for name in expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_what_a_model_is_used_with_comes_along(byte_base, adapter_on, tmp_path) -> None:
    adapter = adapter_on(byte_base, METHODS["spiel"]())
    tokenizer = AutoTokenizer.from_pretrained(byte_base)
    tokenizer.chat_template = "{{ messages[-1]['content'] }} trained"
    tokenizer.save_pretrained(adapter)
    export_adapter(adapter, base=None, to=tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.chat_template == tokenizer.chat_template
    assert found("the fox")["input_ids"] == tokenizer("the fox")["input_ids"]
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_length == 33


def test_memory_holds_one_shard(llama, adapter_on, tmp_path, monkeypatch) -> None:
    """Counted: bytes of all tensors alive whenever a file is written."""
    import safetensors.torch

    base = llama(num_hidden_layers=6)
    base.save_pretrained(tmp_path / "base")
    total = sum(p.numel() * 4 for p in base.parameters())
    adapter = adapter_on(tmp_path / "base", METHODS["spiel"]())
    weights = AdapterWeights(adapter)
    del base
    gc.collect()
    kept = tensors()  # what other tests left must neither go nor make room meanwhile
    before, peak, save = held(kept), [0], safetensors.torch.save_file

    def gauge(*arguments, **more):
        peak[0] = max(peak[0], held(tensors()) - before)
        save(*arguments, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", gauge)
    (tmp_path / "out").mkdir()
    count = write_shards(weights, tmp_path / "out", max_shard_size="60KB")
    assert count >= 4 and total > 4 * 60_000
    assert 40_000 < peak[0] < 60_000 + 1_000


def tensors() -> list[torch.Tensor]:
    """Return all tensors that are alive."""
    kinds = (torch.Tensor, torch.nn.Parameter)  # a plan's fake tensors have no bytes
    found = [obj for obj in gc.get_objects() if type(obj) in kinds]
    return [tensor for tensor in found if not tensor.is_meta]


def held(found: list[torch.Tensor]) -> int:
    """Count the bytes of tensors, those of a storage once."""
    storages = [tensor.untyped_storage() for tensor in found]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_heads_of_other_tasks_are_written_and_reloaded(byte_base, adapter_on, tmp_path) -> None:
    kind = AutoModelForSequenceClassification
    config = sft.SpielConfig(density=0.1, task_type="SEQ_CLS")
    three = type("Three", (), {"from_pretrained": lambda base: kind.from_pretrained(
        base, num_labels=3, pad_token_id=0)})  # fmt: skip
    adapter = adapter_on(byte_base, config, three)
    difference = export_adapter(adapter, base=None, to=tmp_path / "out", say=lambda _: None)
    assert difference == 0
    found = kind.from_pretrained(tmp_path / "out")
    assert type(found).__name__ == "LlamaForSequenceClassification"
    held = load_file(adapter / "adapter_model.safetensors")
    (score,) = (tensor for name, tensor in held.items() if "score" in name)
    assert torch.equal(found.score.weight, score) and score.shape == (3, 32)
    assert "lm_head.weight" not in written(tmp_path / "out")


BERT = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
       "intermediate_size": 64, "patch_size": 8, "num_labels": 3}  # fmt: skip
MIXTRAL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "task", "alone"),
    [
        ("BertForMaskedLM", BERT, None, True),
        ("T5ForConditionalGeneration", T5, "SEQ_2_SEQ_LM", True),
        ("ViTForImageClassification", VIT, None, False),
        ("MixtralForCausalLM", MIXTRAL, "CAUSAL_LM", False),
    ],
    ids=["masked-lm", "seq2seq", "image", "experts"],
)
def test_models_of_all_kinds_are_merged_patched_and_compared(
    adapter_on, tmp_path, kind, settings, task, alone
) -> None:
    """Files of the last two have names of their own, so they are merged in memory."""
    owner = getattr(transformers, kind)
    torch.manual_seed(0)
    owner(owner.config_class(**settings)).save_pretrained(tmp_path / "base")
    if kind.startswith("Mixtral"):
        config = sft.S2FTConfig(density=0.1, task_type=task)
    else:
        config = sft.SpielConfig(density=0.1, task_type=task)
    adapter = adapter_on(tmp_path / "base", config, owner)
    said: list[str] = []
    line = export(adapter, "merged", Request(to=tmp_path / "out"), said.append)
    assert line.endswith("max |logit difference| 0")
    assert said[0].startswith("merged weight by weight" if alone else "merged as a whole in mem")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [kind]
    line = export(adapter, "patch", Request(to=tmp_path / "patch"), said.append)
    assert line.endswith("applied to the base, max |logit difference| 0")


def test_another_base_of_the_same_shape_is_refused(byte_base, adapter_on, tmp_path) -> None:
    adapter = adapter_on(byte_base, METHODS["spiel"]())
    tensors = load_file(byte_base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(tensors, byte_base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit the base .*: model\.layers\.1\.mlp\.up_proj "
                       r"was trained on another base weight"):  # fmt: skip
        export_adapter(adapter, base=None, to=tmp_path / "out", say=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_what_is_laid_out_otherwise_is_merged_in_memory_and_says_so(
    byte_base, adapter_on, tmp_path
) -> None:
    adapter = adapter_on(byte_base, METHODS["spiel"]())
    tensors = load_file(byte_base / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, byte_base / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    assert export_adapter(adapter, base=None, to=tmp_path / "out", say=said.append) == 0
    assert said == [
        "merged as a whole in memory, because the files of the base have no "
        "model.embed_tokens.weight"
    ]
    tokens = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3], **TASK)
    save_file(tensors, byte_base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WholeModelNeededError, match="embed_tokens trains single tokens"):
        AdapterWeights(adapter_on(byte_base, tokens, name="tokens"))


def test_methods_without_a_plain_delta_merge_too(byte_base, adapter_on, tmp_path) -> None:
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    )
    adapter = adapter_on(byte_base, config)
    export_adapter(adapter, base=None, to=tmp_path / "out", say=lambda _: None)
    expected, found = whole(byte_base, adapter), written(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
