"""`sft plan` as it is typed."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sft.cli import app

ALONE = "--no-compare"


def run(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def as_json(*arguments: object):
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_data_add_up(plan_file):
    found = as_json(plan_file, ALONE)
    plan = found["plan"]
    assert sum(plan["bytes"].values()) == plan["peak"] == plan["needed"]
    assert plan["fits"]
    assert found["advice"] == []
    assert plan["seconds"] > 0


def test_all_methods_stand_in_one_table(plan_file):
    found = run(plan_file)
    assert found.exit_code == 0, found.output
    for name in ("this recipe", "s2ft", "sora", "sltrain", "lora", "full", "mezo over spiel"):
        assert name in found.stdout
    assert "trains" in found.stdout


def test_advice_is_taken_until_the_run_fits(plan_file):
    settings = ["--length", 1024, "training.per_device_train_batch_size=8"]
    whole = as_json(plan_file, ALONE, "--gpu", "10GB", *settings)["plan"]["needed"]
    small = f"{0.6 * whole / 2**20:.2f}MB"
    found = as_json(plan_file, ALONE, "--gpu", small, *settings)
    assert not found["plan"]["fits"]
    first, *_ = found["advice"]
    assert first["change"].startswith("training.per_device_train_batch_size=4")
    assert found["advice"][-1]["fits"]
    needs = [found["plan"]["needed"], *(step["needed"] for step in found["advice"])]
    assert needs == sorted(needs, reverse=True)


def test_sharding_divides_what_it_divides(plan_file):
    alone = as_json(plan_file, ALONE, "method={name: full}")["plan"]
    shared = as_json(plan_file, ALONE, "method={name: full}", "--world", 4, "--zero", 3)["plan"]
    assert shared["gradients"] == pytest.approx(alone["gradients"] / 4, rel=1e-3)
    assert shared["bytes"]["trained"] == pytest.approx(alone["bytes"]["trained"] / 4, rel=1e-3)


def test_a_packed_base_takes_a_fraction(plan_file):
    plain = as_json(plan_file, ALONE)["plan"]["bytes"]["weights"]
    packed = as_json(plan_file, ALONE, "model.quantization={bits: nf4}")["plan"]["bytes"]
    assert packed["weights"] < 0.5 * plain
    assert "originals" not in packed  # layers run beside what can't be written


def test_checkpoints_keep_less(plan_file):
    plain = as_json(plan_file, ALONE)["plan"]["activations"]
    name = "training.gradient_checkpointing=true"
    assert as_json(plan_file, ALONE, name)["plan"]["activations"] < 0.5 * plain


def test_a_mistake_is_one_line(plan_file):
    found = run(plan_file, "--gpu", "h1000")
    assert found.exit_code == 2
    assert found.stderr.startswith("sft: --gpu: got 'h1000'")


def test_a_model_of_70_billion_weights_is_planned_from_its_configuration(tmp_path, plan_file):
    """A folder that holds no weight at all."""
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    settings = [f"model.name={tmp_path}", "model.dtype=bfloat16", "--length", 64]
    plan = as_json(plan_file, ALONE, "--gpu", "400GB", *settings)["plan"]
    assert plan["total"] == 70_553_706_496
    assert plan["bytes"]["weights"] >= 2 * (plan["total"] - plan["trained"])


def test_zero_keeps_trained_halves_in_float32_too(plan_file):
    """DeepSpeed steps a copy of four bytes a weight, with two moments as wide."""
    settings = ["method={name: full}", "model.dtype=bfloat16", "--length", 16]
    alone = as_json(plan_file, ALONE, *settings)["plan"]
    shared = as_json(plan_file, ALONE, *settings, "--world", 2, "--zero", 1)["plan"]
    states = alone["bytes"]["optimizer"]
    assert states == pytest.approx(2 * 2 * alone["trained"], rel=0.01)
    assert shared["bytes"]["optimizer"] == pytest.approx(states / 2, rel=0.01)
    assert shared["bytes"]["engine"] >= (4 * alone["trained"] + states) / 2
