"""`sft eval` finds what a run found, whatever it was trained to do."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from sft.errors import UserError
from sft.evaluation.command import evaluate_target
from sft.export.forms import Request, export
from sft.recipe.load import load_recipe
from sft.run.job import train_from_recipe

WORDS = ["one", "two", "three", "four"]
PAIRS = [(a, b) for a in WORDS for b in WORDS]
ROWS = {
    "classification": [{"text": f"{a} {b}", "label": "same" if a == b else a} for a, b in PAIRS],
    "token-classification": [
        {"tokens": [a, b, "six"], "tags": ["B-X", "I-X" if a == b else "O", "O"]} for a, b in PAIRS
    ],
    "reward": [{"prompt": a, "chosen": f" {a}", "rejected": f" {b} six"} for a, b in PAIRS],
    "dpo": [{"prompt": a, "chosen": f" {a}", "rejected": f" {b} six"} for a, b in PAIRS],
}


def trained(tmp_path, tiny_model, task: str):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""\
model: {{name: {tiny_model}}}
task: {task}
method: {{name: spiel, density: 0.2}}
data: {{train: {rows}, eval_examples: 6}}
evaluation: {{batch_size: 4}}
export: {{verify: false}}
training:
  output_dir: {tmp_path / "run"}
  max_steps: 3
  learning_rate: 3e-2
  per_device_train_batch_size: 4
  save_strategy: no
"""
    )
    return train_from_recipe(load_recipe(path), Console(file=io.StringIO())), rows


@pytest.mark.parametrize("task", list(ROWS))
def test_a_run_of_any_task_is_measured_again(tmp_path, tiny_model, task):
    result, rows = trained(tmp_path, tiny_model, task)
    assert result.after != result.before
    found = evaluate_target(str(result.output_dir))
    assert (found["task"], found["examples"]) == (task, 6)
    assert found["metrics"] == pytest.approx(result.after, rel=1e-4)
    assert evaluate_target(str(result.output_dir / "adapter"), data=str(rows))["examples"] == 16
    record = json.loads((result.output_dir / "run.json").read_text())
    assert (record["forgetting"] is not None) == (task == "dpo")


def test_a_saved_classifier_keeps_its_classes(tmp_path, tiny_model):
    result, _ = trained(tmp_path, tiny_model, "classification")
    few = tmp_path / "few.jsonl"  # has two of the five classes
    few.write_text("".join(json.dumps(r) + "\n" for r in ROWS["classification"][:3]))
    alone = result.output_dir / "merged"
    moved = alone.rename(tmp_path / "alone")
    found = evaluate_target(str(moved), data=str(few))
    assert found["task"] == "classification"
    same = evaluate_target(str(result.output_dir), data=str(few))
    assert found["metrics"] == pytest.approx(same["metrics"], rel=1e-4)


@pytest.mark.parametrize("task", ["classification", "token-classification"])
def test_an_adapter_alone_keeps_its_classes(tmp_path, tiny_model, task):
    import peft
    from transformers import AutoConfig

    result, _ = trained(tmp_path, tiny_model, task)
    few = tmp_path / "few.jsonl"  # has not all of the classes
    few.write_text("".join(json.dumps(r) + "\n" for r in ROWS[task][1:4]))
    known = evaluate_target(str(result.output_dir), data=str(few))
    alone = (result.output_dir / "adapter").rename(tmp_path / "alone")
    found = evaluate_target(str(alone), data=str(few))
    assert found["metrics"] == pytest.approx(known["metrics"], rel=1e-4)
    export(alone, "merged", Request(to=tmp_path / "merged"), lambda line: None)
    names = AutoConfig.from_pretrained(tmp_path / "merged").id2label
    assert names == AutoConfig.from_pretrained(result.output_dir / "merged").id2label
    assert json.loads((alone / "labels.json").read_text()) == list(names.values())
    head = {"classification": "Sequence", "token-classification": "Token"}[task]
    stock = getattr(peft, f"AutoPeftModelFor{head}Classification")
    assert stock.from_pretrained(alone, num_labels=len(names)).num_labels == len(names)
    (alone / "labels.json").write_text("{}")
    with pytest.raises(UserError, match=r"labels.json: is damaged \(expected a list of names\)"):
        evaluate_target(str(alone), data=str(few))


def test_a_model_without_a_head_is_not_measured_by_a_random_one(tmp_path, tiny_model):
    _, rows = trained(tmp_path, tiny_model, "classification")
    recipe = str(tmp_path / "tiny.yaml")
    with pytest.raises(UserError, match=r"holds no score.*, which would be random; train"):
        evaluate_target(str(tiny_model), recipe=recipe, data=str(rows))
