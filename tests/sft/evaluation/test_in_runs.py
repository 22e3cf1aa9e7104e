"""What a run measures besides its loss: forgetting, samples, and metrics at each evaluation."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from sft.errors import RecipeError, UserError
from sft.recipe.load import load_recipe
from sft.run.job import train_from_recipe


def run(recipe_file, *overrides: str) -> tuple[dict, str, list[dict]]:
    """Train; return run.json, what was printed, and the Trainer's log."""
    console = Console(record=True, width=200, force_terminal=False)
    recipe = load_recipe(recipe_file, ["training.save_strategy=steps", *overrides])
    result = train_from_recipe(recipe, console)
    record = json.loads((result.output_dir / "run.json").read_text())
    (state,) = result.output_dir.glob("checkpoint-4/trainer_state.json")
    return record, console.export_text(), json.loads(state.read_text())["log_history"]


@pytest.mark.parametrize(
    "method", [(), ("method={name: full}", "training.learning_rate=1e-2")], ids=["spiel", "full"]
)
def test_a_run_notes_forgetting_and_samples(recipe_file, method):
    record, printed, _ = run(recipe_file, "forgetting.max_tokens=100", *method)
    section = record["forgetting"]
    assert section["text"] == "general"
    assert section["tokens"] == 98  # of two windows of at most 64
    assert section["loss_after"] != section["loss_before"]
    assert section["kl"] > 0
    assert "forgetting" in printed
    assert section["alert"] == ("forgetting: loss on general text rose" in printed)
    assert len(record["samples"]) == 3
    assert {"prompt", "reference", "before", "after"} == set(record["samples"][0])
    assert record["samples"][0]["after"] is not None


@pytest.mark.parametrize(
    "method", [(), ("method={name: lora, init_lora_weights: false}",)], ids=["zero", "random"]
)
def test_the_base_is_read_with_the_method_off_and_the_rest_with_it_on(recipe_file, method):
    from sft.evaluation.forgetting import judge
    from sft.evaluation.general_text import windows
    from sft.evaluation.spec import ForgettingSpec
    from sft.models import load_model, load_tokenizer
    from sft.recipe.schema import ModelSpec

    record, _, _ = run(recipe_file, "forgetting.max_tokens=100", *method)
    base = str(load_recipe(recipe_file).model.name)
    spec = ForgettingSpec(max_tokens=100)
    for folder, key in ((base, "before"), (f"{record['output_dir']}/merged", "after")):
        model, tokenizer = (
            load_model(ModelSpec(name=folder)),
            load_tokenizer(ModelSpec(name=folder)),
        )
        loss = judge(model, windows(spec, tokenizer, model)).loss
        assert record["forgetting"][f"loss_{key}"] == pytest.approx(loss, rel=1e-5)
    assert record["forgetting"]["loss_before"] != record["forgetting"]["loss_after"]


def test_it_can_be_left_out(recipe_file):
    record, printed, _ = run(recipe_file, "forgetting=false", "evaluation.samples=0")
    assert (record["forgetting"], record["samples"]) == (None, [])
    assert "general text" not in printed


def test_every_evaluation_logs_the_metrics_and_forgetting(recipe_file):
    _, printed, log = run(
        recipe_file, "training.eval_strategy=steps", "training.eval_steps=2",
        "forgetting={every: eval, max_tokens: 50}",
    )  # fmt: skip
    found = {e["step"]: e for e in log if "eval_exact_match" in e}
    assert set(found) == {2, 4}
    assert {"eval_nll", "eval_token_error_rate", "eval_forgetting_kl"} <= set(found[4])
    assert found[4]["eval_forgetting_kl"] > 0
    assert "step 2/4  eval_loss" in printed


def test_the_last_evaluation_is_what_is_measured_after(recipe_file):
    record, _, log = run(recipe_file, "training.eval_strategy=steps", "training.eval_steps=4")
    last = next(e for e in log if "eval_nll" in e)
    assert last["eval_nll"] == pytest.approx(record["after"]["nll"], rel=1e-6)
    assert last["eval_exact_match"] == record["after"]["exact_match"]


def test_forgetting_at_evaluations_needs_evaluations(recipe_file):
    with pytest.raises(RecipeError, match=r"forgetting\.every: got eval, but training never"):
        load_recipe(recipe_file, ["forgetting.every=eval"])


def test_from_random_weights_there_is_nothing_to_forget(recipe_file):
    method = "method={name: sltrain, form: pretrain, r: 2, density: 0.05}"
    record, printed, _ = run(recipe_file, method, "model.config={}")
    assert record["forgetting"] is None
    assert "general text" not in printed
    assert len(record["samples"]) == 3


def test_other_data_are_judged_as_well(recipe_file, tmp_path):
    questions = tmp_path / "questions.jsonl"
    row = {"question": "one two ->", "choices": ["three", "four"], "answer": 0}
    questions.write_text(f"{json.dumps(row)}\n" * 3)
    record, printed, log = run(
        recipe_file, f"evaluation.also={{mmlu: {questions}}}", "training.eval_strategy=steps",
        "training.eval_steps=4",
    )  # fmt: skip
    assert set(record["also"]) == {"mmlu_choice_accuracy", "mmlu_choice_accuracy_norm"}
    before, after = record["also"]["mmlu_choice_accuracy"]
    assert {before, after} <= {0.0, 1.0}
    assert (
        next(e for e in log if "eval_mmlu_choice_accuracy" in e)["eval_mmlu_choice_accuracy"]
        == after
    )
    assert "also after" in printed


def test_other_data_of_no_use_are_named(recipe_file, tmp_path):
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"tokens": ["one"], "tags": [0]}\n')
    with pytest.raises(UserError, match="found the columns tokens, tags"):
        run(recipe_file, f"evaluation.also={{mmlu: {labelled}}}")
