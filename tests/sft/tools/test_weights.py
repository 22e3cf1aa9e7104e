"""Weights on disk are found by the names that a model in memory gives them."""

from __future__ import annotations

import pytest
import torch

from sft.errors import UserError
from sft.tools import weights as module
from sft.tools.weights import Weights


@pytest.fixture
def never_whole(monkeypatch) -> None:
    """Loading the whole model fails the test."""
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("loads the whole model"))


def test_shards_are_read_as_one(llama, tmp_path, never_whole) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    found = Weights(str(tmp_path / "base"))
    assert set(found.names()) == set(model.state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(found.parameter(name), parameter)


def test_files_without_the_prefix_of_the_body(gpt2, tmp_path, never_whole) -> None:
    model = gpt2()
    model.transformer.save_pretrained(tmp_path / "base")
    name = "transformer.h.1.attn.c_attn.weight"
    found = Weights(str(tmp_path / "base"))
    assert name not in found.names()
    assert torch.equal(found.parameter(name), model.get_parameter(name))


def test_files_with_a_prefix_that_the_model_lacks(llama, tmp_path, never_whole) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    found = Weights(str(tmp_path / "base")).parameter("layers.0.mlp.up_proj.weight")
    assert torch.equal(found, model.model.layers[0].mlp.up_proj.weight)


def test_what_is_tied_is_read_from_the_loaded_model(llama, tmp_path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    found = Weights(str(tmp_path / "base"))
    assert "lm_head.weight" not in found.names()
    assert torch.equal(found.parameter("lm_head.weight"), model.lm_head.weight)
    assert found.parameter("no.such.weight") is None


def test_what_holds_no_weights_is_refused(tmp_path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(UserError, match=r"--base: .*no model.safetensors in it; save the model"):
        Weights(str(tmp_path / "base"))
    (tmp_path / "base" / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match=r"--base: .*: is damaged"):
        Weights(str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"mine: no/such-model: cannot be had"):
        Weights("no/such-model", key="mine")
