"""What a recipe can train beside our own methods: the model itself, and PEFT's adapters."""

from __future__ import annotations

import io
import re

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft.adapters.registry import method_names as ours
from sft.errors import UserError
from sft.export.replay import replay
from sft.recipe.load import load_recipe, to_yaml
from sft.run.full import train_only
from sft.run.job import train_from_recipe
from sft.run.trainable import kind_of, method_names

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


@pytest.fixture
def go(recipe_file):
    """Run the tiny recipe with another method."""

    def run(method: str, *settings: str):
        recipe = load_recipe(recipe_file, [f"method={method}", *settings])
        return train_from_recipe(recipe, Console(file=io.StringIO()))

    return run


def changed(base, merged) -> set[str]:
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_full_trains_the_model_itself(go, tiny_model) -> None:
    run = go("{name: full}")
    assert run.trained_weights == run.all_weights
    assert run.after["nll"] < run.before["nll"]
    assert run.max_logit_difference == 0
    assert not (run.output_dir / "adapter").exists()
    every = set(load_file(tiny_model / "model.safetensors"))
    assert changed(tiny_model, run.output_dir / "merged") == every


def test_full_trains_what_is_named_and_nothing_else(go, tiny_model) -> None:
    run = go("{name: full, modules: ['layers.1', q_proj]}")
    found = changed(tiny_model, run.output_dir / "merged")
    assert found == {
        n for n in load_file(tiny_model / "model.safetensors") if ".layers.1." in n
    } | {"model.layers.0.self_attn.q_proj.weight"}
    assert run.trained_weights < run.all_weights


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        (["lm_head"], {"lm_head.weight"}),
        (["norm"], {"model.norm.weight"}),
        (["*norm"], {"input_layernorm", "post_attention_layernorm", "norm"}),
        (["layers.0.mlp"], {"gate_proj", "up_proj", "down_proj"}),
        (["model.embed_tokens.weight"], {"model.embed_tokens.weight"}),
    ],
)
def test_names_are_whole_or_last_parts(llama, names, trained) -> None:
    model = llama()
    train_only(model, names)
    found = [name for name, p in model.named_parameters() if p.requires_grad]
    assert found
    assert all(any(part in name for part in trained) for name in found)
    assert all(any(part in name for name in found) for part in trained)


def test_a_shared_tensor_is_trained_under_either_name(llama) -> None:
    model = llama(tie_word_embeddings=True)
    train_only(model, ["lm_head"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "model.embed_tokens.weight"
    ]


def test_a_name_that_matches_nothing_is_refused_with_its_neighbour(go, tmp_path) -> None:
    with pytest.raises(UserError, match=r"modules: 'lm_hed': unknown name; did you mean 'lm_head'"):
        go("{name: full, modules: [lm_hed]}")
    assert not (tmp_path / "run").exists()


def test_a_stock_adapter_trains_is_saved_and_merged(go, tiny_model) -> None:
    run = go("{name: lora, r: 2, target_modules: [q_proj, v_proj]}")
    assert run.trained_weights == 2 * 2 * (32 + 32) * 2
    assert run.after["nll"] < run.before["nll"]
    assert 0 < run.max_logit_difference < 1e-3
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(base, run.output_dir / "adapter")
    assert adapted.peft_config["default"].r == 2
    assert str(adapted.peft_config["default"].task_type) == "CAUSAL_LM"
    projections = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qv"}
    assert changed(tiny_model, run.output_dir / "merged") == projections


def test_an_adapter_that_cannot_be_merged_says_so_before_training(
    refused_recipe, recipe_file
) -> None:
    method = "method={name: prompt_tuning, num_virtual_tokens: 2}"
    message = refused_recipe(method)
    assert message.endswith("export.merged: got true, but prompt_tuning cannot be merged into the "
                            "weights of a model; set it to false")  # fmt: skip
    load_recipe(recipe_file, [method, "export.merged=false"])


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("{name: lroa}", "method.name: got 'lroa': unknown method; did you mean "),
        ("{name: lora, rr: 8}", "method.rr: unknown key; did you mean 'r'?"),
        ("{name: lora, r: 8.5}", "method.r: expected a whole number, got 8.5 (float)"),
        ("{name: lora, task_type: SEQ_CLS}", "method.task_type: unknown key"),
        ("{name: lora, runtime_config: {}}", "method.runtime_config: unknown key"),
        ("{name: adalora, total_step: 9}", "method.name: got 'adalora', whose ranks move by calls"),
        ("{name: full, moduls: [a]}", "method.moduls: unknown key; did you mean 'modules'?"),
        ("{name: full, modules: lm_head}", "method.modules: expected a list or null"),
        ("{name: full, modules: []}", "method.modules: got [], allowed is a list of names"),
    ],
)
def test_other_methods_are_checked_as_strictly(refused_recipe, method, says) -> None:
    message = refused_recipe(f"method={method}")
    assert message.startswith("override 'method=")
    assert says in message


def test_the_resolved_method_shows_every_default_and_reads_back(recipe_file, tmp_path) -> None:
    for method in ("{name: lora, target_modules: [v_proj, q_proj]}", "{name: full}"):
        recipe = load_recipe(recipe_file, [f"method={method}"])
        again = tmp_path / "tiny.yaml"
        text = to_yaml(recipe)
        assert re.search(r"^  (lora_alpha: 8|modules: null)$", text, re.MULTILINE)
        (tmp_path / "again").mkdir(exist_ok=True)
        again = tmp_path / "again" / "tiny.yaml"
        again.write_text(text)
        assert load_recipe(again) == recipe


def test_each_name_has_one_owner() -> None:
    names = method_names()
    assert len(names) == len(set(names))
    assert {"full", "lora", "ia3", *ours()} <= set(names)
    for name in ours():
        assert kind_of(name).__name__ == "SparseAdapter"
    assert kind_of("lora").__name__ == "StockAdapter"


def test_an_interrupted_run_of_the_model_itself_goes_on(go, tmp_path) -> None:
    steps = ("training.save_strategy=steps", "training.save_steps=2")
    whole = go("{name: full}", *steps)
    (tmp_path / "run/checkpoint-4/sft_state.json").unlink()  # as if it had been cut short
    resumed = go("{name: full}", *steps, "training.resume_from_checkpoint=auto")
    assert resumed.after == whole.after
    assert (tmp_path / "run/checkpoint-4/sft_state.json").is_file()


@pytest.mark.parametrize("section", ["null", "{eps: 0.1}"], ids=["backward", "forward alone"])
@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.filterwarnings("ignore:.*virtual tokens:UserWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_prompts_are_trained_and_measured(go, name, section, tmp_path) -> None:
    method = f"{{name: {name}, num_virtual_tokens: 2}}"
    settings = ("export.merged=false", "evaluation.metrics=[nll]", f"zeroth_order={section}")
    run = go(method, *settings, "training.learning_rate=0.3")
    assert run.after["nll"] != run.before["nll"]
    assert run.after["nll"] < run.before["nll"] + 0.1
    if section != "null":
        done = replay(run.output_dir, to=tmp_path / "adapter", form="adapter")
        assert done.proven
