"""Classes: found in data or given by name, and numbered alike everywhere."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from sft.errors import UserError
from sft.tasks.labels import class_number, label_names
from sft.tasks.token_classification import first_tokens


def rows(labels):
    return Dataset.from_dict({"label": labels})


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([2, 0, 2], ["0", "1", "2"]),
        (["10", "9"], ["10", "9"]),
        ([0.5, 1.0], None),
        ([["O", "B-X"], ["I-X"]], ["B-X", "I-X", "O"]),
    ],
    ids=["names", "numbers", "digits", "real", "tags"],
)
def test_classes_are_found(labels, names):
    assert label_names(rows(labels), "label", None) == names


def test_a_data_sets_own_names_and_given_ones_come_first():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    assert label_names(data, "label", None) == ["no", "yes"]
    assert label_names(rows([1, 0]), "label", ["no", "yes"]) == ["no", "yes"]
    assert class_number(1, ["no", "yes"]) == class_number("yes", ["no", "yes"]) == 1


def test_an_unknown_class_is_named():
    with pytest.raises(UserError, match=r"task\.labels: got the label 'maybe' .* no, yes"):
        label_names(rows(["no", "maybe"]), "label", ["no", "yes"])


def test_streamed_rows_need_names():
    streamed = rows(["a"]).to_iterable_dataset()
    with pytest.raises(UserError, match=r"task\.labels: is missing"):
        label_names(streamed, "label", None)
    assert label_names(streamed, "label", ["a"]) == ["a"]


def test_the_first_token_of_a_word_has_its_tag():
    assert first_tokens([None, 0, 0, 1, None], [3, 4]) == [-100, 3, -100, 4, -100]


@pytest.mark.parametrize("label", [1, "1", 2, 0, True, -1], ids=str)
def test_training_and_evaluation_number_classes_alike(label):
    from transformers import LlamaConfig

    from sft.evaluation.classification import class_of

    names = ["-1", "1", "0", "2"]  # out of order: a name is not its number
    config = LlamaConfig(num_labels=4)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    found = class_number(label, names)
    assert type(found) is int and found == class_of(label, config)
    assert label is True or names[found] == str(label)


def test_one_class_is_nothing_to_learn():
    with pytest.raises(UserError, match=r"^data.train: label: got one class alone \(a\)"):
        label_names(rows(["a", "a"]), "label", None)
    assert label_names(rows(["a", "a"]), "label", ["a", "b"]) == ["a", "b"]
