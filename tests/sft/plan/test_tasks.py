"""Plans of tasks other than completions: the model, the sequences and the loss of each."""

from __future__ import annotations

import pytest
import yaml

from sft.plan.batch import batch_of
from sft.plan.devices import Device
from sft.plan.placement import Placement
from sft.plan.plan import plan
from sft.recipe.load import load_recipe

DEVICE = Device("a CPU", 2**40, "cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def config_of(kind):
    import transformers as t

    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
        return t.T5Config(vocab_size=64, **sizes)
    if kind == "vit":
        sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
        return t.ViTConfig(**sizes, intermediate_size=48, image_size=16, patch_size=8)
    if kind == "bert":
        return t.BertConfig(**SIZES, intermediate_size=48)
    return t.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)


@pytest.fixture
def planned(tmp_path):
    def make(kind, task, method="spiel", device=DEVICE, **training):
        config = config_of(kind)
        config.save_pretrained(tmp_path / kind)
        settings = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4}
        content = {
            "model": {"name": str(tmp_path / kind)}, "task": task,
            "method": {"name": method} | ({"density": 0.05} if method == "spiel" else {}),
            "data": {"train": str(tmp_path / "none.jsonl")},
            "training": settings | {"use_cpu": True} | training,
        }  # fmt: skip
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(content))
        recipe = load_recipe(path)
        batch = batch_of(recipe, 16)
        return plan(recipe, batch, device, Placement()), batch

    return make


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("llama", "dpo"), ("llama", "reward"), ("bert", "classification"), ("t5", "seq2seq"),
        ("bert", "token-classification"), ("bert", "masked-lm"), ("vit", "image-classification"),
    ],
)  # fmt: skip
def test_every_task_is_planned_by_its_own_model(planned, kind, task):
    found, _ = planned(kind, task, "full")
    adapter, _ = planned(kind, task)
    assert found.trained == found.total and found.gradients == 4 * found.trained
    heads = {"classification": 66, "token-classification": 66, "image-classification": 66}
    least = heads.get(task, 32 if task == "reward" else 0)  # a new head is trained densely
    assert least < adapter.trained < found.trained / 2
    assert found.activations > 0 and found.peak > adapter.peak


def test_a_preference_is_two_sequences(planned):
    one, single = planned("llama", "sft")
    two, double = planned("llama", "dpo")
    assert double.tokens == 2 * single.tokens and double.rows == single.rows
    assert two.activations == pytest.approx(2 * one.activations, rel=0.1)


def test_a_policy_reads_what_it_writes(planned):
    task = {"name": "grpo", "rewards": [{"name": "length", "target": 4}]}
    _, batch = planned("llama", task, num_generations=2, max_completion_length=8)
    assert (batch.length, batch.labels) == (16 + 8, 4 * 8)


def test_a_reference_costs_a_forward_pass_or_a_second_model(planned):
    """TRL reads the reference while the policy's graph is alive; `full` needs a second model."""
    known = {"precompute_ref_log_probs": True}
    for method, copies in (("spiel", 0), ("full", 1)):
        with_it, batch = planned("llama", "dpo", method)
        without, other = planned("llama", "dpo", method, **known)
        assert (batch.reference, other.reference) == (("itself", "copy")[copies], "none")
        more = with_it.device_bytes["weights"] - without.device_bytes.get("weights", 0)
        assert more == copies * 4 * with_it.total
        assert with_it.activations == without.activations


def test_a_reference_takes_time(planned):
    seconds = {}
    for known in (True, False):
        counting = Device("flops", 2**40, "cpu", single=1.0, bandwidth=1e30)
        found, _ = planned("llama", "dpo", device=counting, precompute_ref_log_probs=known)
        seconds[known] = found.seconds
    assert 1.2 * seconds[True] < seconds[False] < 1.5 * seconds[True]  # 6 products for 4


@pytest.mark.parametrize(("beta", "reference"), [(0.0, "none"), (0.1, "itself")])
def test_a_policy_held_to_its_start_has_a_reference(planned, beta, reference):
    task = {"name": "grpo", "rewards": [{"name": "length", "target": 4}]}
    _, batch = planned("llama", task, beta=beta, num_generations=2, max_completion_length=8)
    assert batch.reference == reference
