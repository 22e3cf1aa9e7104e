"""Each format is told by its columns, and comes out as tasks take it."""

from __future__ import annotations

import pytest

from sft.data.formats import KNOWN, canonical
from sft.data.spec import FORMATS
from sft.tasks.find import task_classes

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
TOOLS = '[{"type": "function", "function": {"name": "add"}}]'
CHAT = ("prompt_completion", "messages", "text")

# format, row, what a task gets
ROWS = {
    "text": ({"text": "one"}, {"text": "one"}),
    "prompt_completion": (
        {"prompt": "a", "completion": "b", "id": 1},
        {"prompt": "a", "completion": "b"},
    ),
    "messages": (
        {"messages": [USER, ASSISTANT], "tools": TOOLS},
        {"messages": [USER, ASSISTANT], "tools": TOOLS},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 + 2?", "output": "4"},
        {"prompt": [{"role": "user", "content": "Add.\n\n2 + 2?"}], "completion": [ASSISTANT]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [USER, ASSISTANT]},
    ),
    "preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    "prompt": ({"prompt": "a", "answer": 3}, {"prompt": "a", "answer": 3}),
    "classification": (
        {"text": "a", "text_pair": "b", "label": "yes"},
        {"text": "a", "text_pair": "b", "label": "yes"},
    ),
    "token_classification": (
        {"tokens": ["a", "b"], "ner_tags": [0, 1]},
        {"tokens": ["a", "b"], "tags": [0, 1]},
    ),
    "seq2seq": ({"source": "a", "target": "b"}, {"prompt": "a", "completion": "b"}),
    "multiple_choice": (
        {"question": "a", "choices": ["b", "c"], "answer": 1},
        {"question": "a", "choices": ["b", "c"], "answer": 1},
    ),
    "tokenised": (
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
    ),
}


def test_all_formats_have_a_name_in_recipes():
    assert set(FORMATS) == {"auto", *KNOWN}
    assert {*ROWS, "image_classification"} == set(KNOWN)


def test_tasks_take_formats_that_exist():
    for task in task_classes().values():
        assert {canonical(name) for name in task.formats} == set(task.formats)


@pytest.mark.parametrize("format", list(ROWS))
def test_a_format_is_told_by_its_columns(jsonl, load, format):
    row, expected = ROWS[format]
    found = load(jsonl("a.jsonl", row))
    assert found.format == canonical(format)
    assert {k: v for k, v in found.train[0].items() if v is not None} == expected


@pytest.mark.parametrize("format", [*ROWS])
def test_streams_give_the_same_rows(jsonl, load, format):
    row, expected = ROWS[format]
    if format in ("classification", "token_classification"):
        pytest.skip("streams have no classes")
    found = load(jsonl("a.jsonl", row), streaming=True)
    assert found.format == canonical(format)
    assert next(iter(found.train)) == expected


def test_implicit_prompts_and_chats_of_preferences_are_kept(jsonl, load):
    row = {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "5"}]}
    assert load(jsonl("a.jsonl", row)).train[0] == row


def test_alpaca_is_text_to_a_task_that_reads_no_chats(jsonl, load):
    row = {"instruction": "Add.", "input": "", "output": "4", "system": "Be short."}
    found = load(jsonl("a.jsonl", row), formats=("prompt_completion",))
    assert found.train[0] == {"prompt": "Be short.\n\nAdd.", "completion": "4"}
    chat = load(jsonl("a.jsonl", row), formats=CHAT).train[0]["prompt"]
    assert [message["role"] for message in chat] == ["system", "user"]


def test_the_task_decides_between_formats(jsonl, load, refused):
    both = jsonl("a.jsonl", {"text": "a", "label": 1})
    assert load(both).format == "classification"
    assert load(both, formats=CHAT).format == "text"
    pair = jsonl("b.jsonl", {"prompt": "a", "completion": "b"})
    assert load(pair, formats=("prompt",)).train.column_names == ["prompt", "completion"]
    message = refused(pair, formats=("preference",))
    assert "expected one of: preference: chosen + rejected" in message
    assert "got alpaca, the task takes" in refused(pair, formats=("text",), format="alpaca")


def test_columns_are_renamed_or_made(jsonl, load, refused):
    path = jsonl("a.jsonl", {"question": "Why?", "reply": "So.", "prompt": "not this"})
    columns = {"prompt": "question", "completion": "reply"}
    assert load(path, columns=columns).train[0] == {"prompt": "Why?", "completion": "So."}
    made = {"prompt": "Q: {question}\nA:", "completion": " {reply} {{end}}"}
    row = {"prompt": "Q: Why?\nA:", "completion": " So. {end}"}
    assert load(path, columns=made).train[0] == row
    assert next(iter(load(path, columns=made, streaming=True).train)) == row
    message = refused(path, columns={"prompt": "query"})
    assert "data.columns.prompt: " in message
    assert "got 'query', allowed is question, reply, prompt" in message
    assert "got 'query'" in refused(path, columns={"prompt": "{query}"}, streaming=True)


def test_classes_go_into_templates_by_name(tmp_path, load):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    columns = {"prompt": "{text} It was", "completion": " {label}"}
    found = load(tmp_path / "saved", columns=columns, formats=CHAT)
    assert found.train[0] == {"prompt": "a It was", "completion": " good"}
