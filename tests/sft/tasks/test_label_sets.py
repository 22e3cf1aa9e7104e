"""Classification in which an example has any number of classes."""

from __future__ import annotations

import json

import pytest
import torch

from sft.data.load import load_data
from sft.data.spec import DataSpec
from sft.errors import UserError
from sft.evaluation.label_sets import one_each, set_metrics

TEXTS = ["one two", "two three", "three one", "none"] * 4
LABELS = [["low", "mid"], ["mid", "high"], ["high", "low"], []] * 4


@pytest.fixture
def trained(tmp_path, models, rows_file):
    """Train on lists of classes; return the result and the folder."""
    from sft.recipe.load import load_recipe
    from sft.run.job import train_from_recipe

    def run(*changes):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            json.dumps(
                {
                    "model": {"name": str(models("bert"))},
                    "task": "classification",
                    "method": {"name": "spiel", "density": 0.1},
                    "data": {"train": str(rows_file("", {"text": TEXTS, "labels": LABELS})),
                             "eval_examples": 4},
                    "evaluation": {"metrics": ["accuracy", "f1", "micro_f1"]},
                    "training": {"output_dir": str(tmp_path / "run"), "max_steps": 2,
                                 "per_device_train_batch_size": 4, "use_cpu": True},
                }
            )
        )  # fmt: skip
        return train_from_recipe(load_recipe(recipe, list(changes))), tmp_path / "run"

    return run


def test_lists_of_classes_are_learnt_by_a_loss_of_each(trained):
    from transformers import AutoModelForSequenceClassification

    result, folder = trained()
    assert set(result.after) == {"accuracy", "f1", "micro_f1"}
    config = json.loads((folder / "merged/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {"0": "high", "1": "low", "2": "mid"}
    model = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    ids, wanted = torch.tensor([[1, 2, 3]]), torch.tensor([one_each([0, 2], 3)])
    found = model(input_ids=ids, labels=wanted)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(found.logits, wanted)
    assert torch.allclose(found.loss, loss)


def test_training_takes_the_loss_of_each_class(trained, monkeypatch):
    """At rate 0 the mean loss is that of the untrained model on the rows that were read."""
    seen = []
    real = torch.nn.BCEWithLogitsLoss.forward

    def noting(self, logits, labels):
        seen.append(labels.tolist())
        return real(self, logits, labels)

    monkeypatch.setattr(torch.nn.BCEWithLogitsLoss, "forward", noting)
    trained("training.learning_rate=0")
    order = ["high", "low", "mid"]
    expected = {tuple(float(name in label) for name in order) for label in LABELS}
    assert {tuple(row) for batch in seen for row in batch} <= expected
    assert len(seen) >= 2


def test_a_list_with_an_unknown_class_is_named_by_its_line(trained, tmp_path):
    rows = [{"text": "one", "label": ["low"]}, {"text": "two", "label": ["low", "odd"]}]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"other\.jsonl:2: label: got 'odd', allowed is high, low"):
        trained(f"data.eval={path}", "data.eval_examples=null")


@pytest.mark.parametrize("metric", ["matthews", "mse"])
def test_metrics_of_one_class_are_refused(trained, metric):
    with pytest.raises(UserError, match="the labels are lists of classes; allowed is accuracy"):
        trained(f"evaluation.metrics=[{metric}]")


def test_a_row_of_no_class_is_no_mistake(rows_file):
    path = rows_file("", {"text": ["a", "b"], "label": [["x"], []]})
    assert load_data(DataSpec(train=str(path)), 0, ("classification",)).train["label"][1] == []
    path = rows_file("", {"text": ["a"], "label": [[["x"]]]})
    with pytest.raises(UserError, match=r"rows\.jsonl:1"):
        load_data(DataSpec(train=str(path)), 0, ("classification",))


def test_metrics_of_sets_are_counted_by_hand():
    actual = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]]
    predicted = [[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    found = set_metrics(predicted, actual, ["accuracy", "f1", "micro_f1"])
    first, second = 2 * 2 / (3 + 2), 2 * 1 / (1 + 2)  # the third class is never there
    assert found == pytest.approx(
        {"accuracy": 0.5, "f1": (first + second) / 2, "micro_f1": 2 * 3 / (4 + 4)}, abs=1e-9
    )
    assert set_metrics([[0]], [[0]], ["f1", "micro_f1"]) == {"f1": 0.0, "micro_f1": 0.0}
