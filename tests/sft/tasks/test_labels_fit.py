"""Labels that fit neither the classes of training nor the metrics are named, with file and line."""

from __future__ import annotations

import json

import pytest

from sft.data.load import load_data
from sft.data.spec import DataSpec
from sft.errors import UserError
from sft.tasks.find import build_task


@pytest.fixture
def write(tmp_path):
    def rows(name, column, *values):
        inputs = {"label": {"text": "a b"}, "tags": {"tokens": ["a", "b"]}}[column]
        lines = [
            json.dumps({**inputs, column: v} | ({"text": f"a {i}"} if column == "label" else {}))
            for i, v in enumerate(values)
        ]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return rows


def check(task, *metrics, labels=None, **data):
    built = build_task({"name": task, "labels": labels})
    examples = load_data(DataSpec(**data), 0, built.formats)
    built.check_data(examples, metrics or built.measured, "evaluation.metrics")
    return examples


@pytest.mark.parametrize(
    ("values", "metric", "message"),
    [
        ((0.5, 1.5, 2.0), "accuracy", "got accuracy, but the labels are real numbers; allowed is "),
        (("a", "b", "a"), "mse", "got mse, but the labels are classes; allowed is accuracy, f1, "),
    ],
    ids=["regression", "classes"],
)
def test_metrics_fit_the_labels(write, values, metric, message):
    rows = write("rows.jsonl", "label", *values)
    with pytest.raises(UserError, match=f"^evaluation.metrics: {message}"):
        check("classification", metric, train=rows)
    check("classification", train=rows)  # of the default ones those that fit are measured


@pytest.mark.parametrize(
    ("task", "column", "known", "other"),
    [
        ("classification", "label", ["a", "b"], ["b", "c"]),
        ("token-classification", "tags", [["O", "X"]], [["O", "O"], ["O", "c"]]),
    ],
    ids=["classification", "tags"],
)
def test_a_held_out_label_is_one_of_training(write, task, column, known, other):
    train, held_out = write("train.jsonl", column, *known), write("eval.jsonl", column, *other)
    with pytest.raises(UserError) as caught:
        check(task, train=train, eval=held_out)
    shown = "a, b" if column == "label" else "O, X"
    assert str(caught.value) == (
        f"data.eval: {held_out}:2: {column}: got 'c', allowed is {shown}, the classes of training; "
        "mend the row, or name the classes by task.labels"
    )
    names = [*shown.split(", "), "c"]
    assert check(task, train=train, eval=held_out, labels=names).held_out is not None


def test_a_label_to_train_on_is_one_of_those_named(write, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("kind,text\na,x\nb,y\nc,z\n")
    given = {"train": str(table), "columns": {"label": "kind"}}
    with pytest.raises(UserError, match=r"^data.train: .*rows.csv:4: label: got 'c', allowed is"):
        check("classification", labels=["a", "b"], **given)


def test_classes_that_files_number_otherwise_go_by_name(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    def save(name, classes, numbers):
        features = Features({"text": Value("string"), "label": ClassLabel(names=classes)})
        rows = {"text": [f"{name} {i}" for i in numbers], "label": numbers}
        Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    train, held_out = save("t", ["a", "b"], [0, 1]), save("h", ["b", "a"], [0, 1])
    found = check("classification", train=train, eval=held_out)
    assert found.held_out["label"] == ["b", "a"]
    more = save("m", ["b", "c"], [0, 1])
    with pytest.raises(UserError, match=r"^data.eval: .*m: example 2: label: got 'c', allowed"):
        check("classification", train=train, eval=more)
