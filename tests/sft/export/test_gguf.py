"""GGUF files: what transformers reads back is the model, rounded as was asked."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import sft
from sft.errors import UserError
from sft.export.forms import Request, export
from sft.export.gguf_file import rounded, stored_as, write_gguf
from sft.export.gguf_layout import Layout
from sft.export.gguf_tokenizer import pre_of, vocabulary_of
from sft.export.stored import FolderWeights

SIZES = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def quiet(_: str) -> None:
    pass


def saved(model, tokenizer, folder):
    with torch.no_grad():
        for parameter in model.parameters():  # norms are not all ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig(**SIZES, tie_word_embeddings=True), LlamaForCausalLM),
        (LlamaConfig(**SIZES, head_dim=16), LlamaForCausalLM),
        (Qwen2Config(**SIZES), Qwen2ForCausalLM),
        (Qwen3Config(**SIZES, head_dim=128), Qwen3ForCausalLM),
    ],
    ids=["llama", "llama-heads", "qwen2", "qwen3"],
)
def test_architectures_are_read_back_bit_for_bit(config, kind, byte_tokenizer, tmp_path) -> None:
    torch.manual_seed(0)
    folder = saved(kind(config), byte_tokenizer, tmp_path / "model")
    line = export(folder, "gguf", Request(to=tmp_path / "out", gguf_type="f32"), quiet)
    assert "read by transformers, max |logit difference| 0 (rounding to f32" in line
    found = kind.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    state = kind.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert ("output.weight" in names) == (not config.tie_word_embeddings)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_an_adapter_is_merged_and_rounded(byte_base, adapter_on, tmp_path, kind) -> None:
    adapter = adapter_on(byte_base, sft.SpielConfig(density=0.1, task_type="CAUSAL_LM"))
    line = export(adapter, "gguf", Request(to=tmp_path / "out", gguf_type=kind), quiet)
    assert "max |logit difference| 0 (rounding to" in line
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["blk.1.ffn_up.weight"] == kind.upper()
    assert types["output_norm.weight"] == "F32"
    export(adapter, "merged", Request(to=tmp_path / "merged"), quiet)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    up = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
    held = torch.from_numpy(gguf.dequantize(up.data, up.tensor_type).copy())
    assert torch.equal(held, rounded(merged["model.layers.1.mlp.up_proj.weight"], kind))
    off = held - merged["model.layers.1.mlp.up_proj.weight"]
    assert 0 < float(off.abs().max()) < 0.02


def test_the_tokenizer_comes_along(byte_base, tmp_path) -> None:
    ours = AutoTokenizer.from_pretrained(byte_base)
    write_gguf(FolderWeights(byte_base), ours, tmp_path, name="mine")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("The quick brown fox\n\n 123 été", "<end>the<pad> <mark>fox"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.chat_template == ours.chat_template
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    read = {name: field.contents() for name, field in fields.items()}
    assert read["general.name"] == "mine" and read["tokenizer.ggml.pre"] == "gpt-2"
    assert read["tokenizer.ggml.eos_token_id"] == 1 and read["llama.rope.freq_base"] == 10_000
    tokens, types = read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 272 and tokens[-1] == "[PAD271]"
    kinds = dict(zip(tokens, types, strict=True))
    assert (kinds["<end>"], kinds["<mark>"], kinds["[PAD271]"], kinds["a"]) == (3, 4, 5, 1)
    content = json.loads(ours.backend_tokenizer.to_str())["model"]
    assert read["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["merges"]]
    assert read["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.slow
def test_the_file_says_what_llama_cpp_says_of_the_same_model(tmp_path) -> None:
    """The quickstart model was a GGUF file once, made by llama.cpp's own script."""
    from sft.embedded import MODELS, find_gguf, folder_of

    folder = folder_of("smollm2-135m-instruct")
    write_gguf(FolderWeights(folder), AutoTokenizer.from_pretrained(folder), tmp_path, kind="f32")
    files = (find_gguf(MODELS["smollm2-135m-instruct"])[0], tmp_path / "model.gguf")
    theirs, ours = (gguf.GGUFReader(path) for path in files)
    wanted, found = ({t.name: tuple(t.shape) for t in each.tensors} for each in (theirs, ours))
    assert found == wanted
    for name, field in theirs.fields.items():
        told = name.startswith(("llama.", "tokenizer.")) and "add_space" not in name
        if told and name != "tokenizer.ggml.pre":  # its digits are cut otherwise in transformers
            assert ours.fields[name].contents() == field.contents(), name
    values = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in theirs.tensors}
    for tensor in ours.tensors:
        assert (tensor.data.reshape(-1) == values[tensor.name].reshape(-1)).all(), tensor.name


def test_ways_to_cut_text_have_names_or_are_refused() -> None:
    level = {"type": "ByteLevel", "use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_of({"type": "Sequence", "pretokenizers": [digits, level]}) == "smollm"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    assert pre_of({"type": "Sequence", "pretokenizers": [split, level]}) == "qwen2"
    three = {"type": "Split", "pattern": {"Regex": pattern.replace(r"|\p{N}|", r"|\p{N}{1,3}|")}}
    assert pre_of({"type": "Sequence", "pretokenizers": [three, level]}) == "llama-bpe"
    for other in (None, level, {"type": "Metaspace"}):
        with pytest.raises(UserError, match=r"not known here; export --to merged, and convert"):
            pre_of(other)


def test_what_is_not_written_is_said_in_one_line(tiny_tokenizer, byte_base, tmp_path) -> None:
    with pytest.raises(UserError, match="the tokenizer is a WordLevel, written is byte-level BPE"):
        vocabulary_of(tiny_tokenizer, 12)
    request = Request(to=tmp_path / "out", gguf_type="q4_0")
    with pytest.raises(UserError, match="--gguf-type: got 'q4_0'; expected one of f32, f16"):
        export(byte_base, "gguf", request, quiet)
    assert not (tmp_path / "out").exists()
    plain = {"architectures": ["LlamaForCausalLM"]}
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    for config, message in (
        (LlamaConfig(**SIZES, rope_parameters=scaled, **plain), "rope_type='llama3' is not writ"),
        (LlamaConfig(**SIZES, attention_bias=True, **plain), "attention_bias=True is not written"),
        (LlamaConfig(**SIZES, architectures=["LlamaForSequenceClassification"]), "got LlamaForSeq"),
    ):
        with pytest.raises(UserError, match=message):
            Layout(config)
    bert = json.loads('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    with pytest.raises(UserError, match="got BertForMaskedLM, written are causal language models"):
        Layout(type("Config", (), bert))
    with pytest.raises(UserError, match=r"extra\.weight has no place in llama; export --to merged"):
        Layout(LlamaConfig(**SIZES, **plain)).name("model.extra.weight")


def test_a_file_that_is_not_read_back_is_refused(byte_tokenizer, tmp_path) -> None:
    config = Qwen3Config(**SIZES, head_dim=16)  # transformers takes all heads of Qwen3 for wide
    folder = saved(Qwen3ForCausalLM(config), byte_tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="does not read the GGUF file back"):
        export(folder, "gguf", Request(to=tmp_path / "out"), quiet)
    assert not (tmp_path / "out").exists()
    export(folder, "gguf", Request(to=tmp_path / "out", verify=False), quiet)
    assert (tmp_path / "out/model.gguf").is_file()


def test_rows_that_do_not_fill_blocks_are_stored_in_16_bits() -> None:
    assert stored_as((8, 33), "q8_0") == "f16"
    assert stored_as((8, 64), "q8_0") == "q8_0"
    assert stored_as((64,), "q8_0") == "f32"
