"""A tiny model and tokenizer on disk, and a recipe that trains them in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "->"]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "<end>", "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def save_model(tiny_tokenizer) -> Callable[..., Path]:
    """Save a Llama of two layers, with the tiny tokenizer; the same weights every time."""

    def save(folder: Path, **changes: Any) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        fields = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        }
        LlamaForCausalLM(LlamaConfig(**(fields | changes))).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, save_model) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rows(tmp_path) -> Path:
    """Sixty-four prompts, each completed by the number after it."""
    path = tmp_path / "rows.jsonl"
    numbers = WORDS[:8]
    lines = [
        {"prompt": f"{a} {b} ->", "completion": f" {numbers[(i + 1) % 8]}"}
        for i, a in enumerate(numbers)
        for b in numbers
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def recipe_file(tmp_path, tiny_model, rows) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""\
model:
  name: {tiny_model}
method:
  name: spiel
  density: 0.05
  reselect_every: 2
  window: 1
data:
  train: {rows}
  eval_examples: 8
evaluation:
  metrics: [nll, token_error_rate, exact_match]
  max_new_tokens: 4
training:
  output_dir: {tmp_path / "run"}
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  logging_steps: 2
  save_strategy: no
"""
    )
    return path


@pytest.fixture
def refused_recipe(recipe_file) -> Callable[..., str]:
    """Load the tiny recipe with settings that are refused; return the one line that says why."""

    def refuse(*settings: str) -> str:
        from sft.errors import RecipeError
        from sft.recipe.load import load_recipe

        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe_file, settings)
        (line,) = str(caught.value).splitlines()
        return line

    return refuse
