"""A model of a few layers as a configuration alone, and recipes for it."""

from __future__ import annotations

import pytest

ROWS, LENGTH = 4, 48


@pytest.fixture(scope="session")
def plan_model(tmp_path_factory):
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("planned")
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory, plan_model):
    path = tmp_path_factory.mktemp("recipes") / "planned.yaml"
    path.write_text(
        f"""\
model:
  name: {plan_model}
  dtype: float32
method:
  name: spiel
  density: 0.02
data:
  train: missing.jsonl
training:
  output_dir: {path.parent / "run"}
  max_steps: 4
  max_length: {LENGTH}
  per_device_train_batch_size: {ROWS}
"""
    )
    return path


@pytest.fixture
def plan_recipe(plan_file):
    from sft.recipe.load import load_recipe

    return load_recipe(plan_file)
