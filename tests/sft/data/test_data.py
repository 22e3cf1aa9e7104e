from __future__ import annotations

import json

import pytest

from sft.data.formats import detect_format
from sft.data.load import load_data
from sft.data.spec import DataSpec
from sft.errors import UserError


def refused(path, **fields):
    with pytest.raises(UserError) as caught:
        load_data(DataSpec(train=str(path), **fields), seed=0)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path):
    def _write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("name", "text", "format", "count"),
    [
        ("a.jsonl", jsonl({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}),
         "prompt_completion", 2),
        ("a.json", json.dumps([{"text": "a"}, {"text": "b"}, {"text": "c"}]), "text", 3),
        ("a.jsonl", jsonl({"messages": MESSAGES}), "messages", 1),
        ("a.csv", "prompt,completion,extra\na,b,1\nc,d,2\n", "prompt_completion", 2),
        ("a.txt", "first line\n\nsecond line\n", "text", 2),
    ],
)  # fmt: skip
def test_formats_are_recognised_by_their_columns(write, name, text, format, count):
    data = load_data(DataSpec(train=str(write(name, text))), seed=0)
    assert data.format == format
    assert len(data.train) == count
    assert data.held_out is None


def test_parquet_is_read(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    assert len(load_data(DataSpec(train=str(tmp_path / "a.parquet")), seed=0).train) == 2


def test_bad_files_are_refused_by_name_and_line(write, tmp_path):
    assert "no such file" in refused(tmp_path / "none.jsonl")
    assert "expected a file ending in" in refused(write("a.xml", "<a/>"))
    assert "is empty" in refused(write("empty.jsonl", ""))
    assert "no examples" in refused(write("blank.txt", "\n \n"))
    bad = write("bad.jsonl", jsonl({"text": "a"}) + '{"text": "b"\n' + jsonl({"text": "c"}))
    assert f"{bad}:2: not valid JSON" in refused(bad)
    listed = write("list.jsonl", jsonl({"text": "a"}) + "[1]\n")
    assert f"{listed}:2: expected one JSON object a line" in refused(listed)


def test_columns_are_named_when_they_fit_nothing(write):
    message = refused(write("a.jsonl", jsonl({"question": "a", "answer": "b"})))
    assert "found the columns question, answer" in message
    assert "prompt + completion" in message
    message = refused(write("b.jsonl", jsonl({"text": "a"})), format="messages")
    assert "messages needs messages" in message
    message = refused(write("c.jsonl", jsonl({"text": "a", "messages": MESSAGES})))
    assert "set data.format" in message


def test_holes_and_wrong_types_are_refused(write):
    holes = jsonl({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None})
    assert "a.jsonl:2: 'completion' is missing" in refused(write("a.jsonl", holes))
    assert "b.jsonl:1: 'text' holds 1 (int)" in refused(write("b.jsonl", jsonl({"text": 1})))


def test_held_out_examples_are_seeded_and_disjoint(rows):
    def split(seed):
        data = load_data(DataSpec(train=str(rows), eval_fraction=0.25), seed)
        return data.train["prompt"], data.held_out["prompt"]

    train, held_out = split(0)
    assert len(held_out) == 16
    assert not set(train) & set(held_out)
    assert split(0) == (train, held_out)
    assert split(1) != (train, held_out)


def test_copies_of_held_out_examples_are_not_trained_on(write):
    path = write("a.jsonl", jsonl(*[{"text": str(i % 5)} for i in range(50)]))
    data = load_data(DataSpec(train=str(path), eval_examples=2), seed=0)
    assert not set(data.train["text"]) & set(data.held_out["text"])
    only = write("b.jsonl", jsonl(*[{"text": "same"}] * 10))
    assert "also held out" in refused(only, eval_examples=2)


def test_sizes_that_cannot_be_are_refused(rows, write):
    assert "has 64 examples" in refused(rows, eval_examples=64)
    assert "data.eval_fraction: got 0.001" in refused(rows, eval_fraction=0.001)


def test_a_held_out_file_is_used_as_it_is(rows, write):
    other = write("eval.jsonl", jsonl({"prompt": "a", "completion": "b"}))
    data = load_data(DataSpec(train=str(rows), eval=str(other), train_examples=10), seed=0)
    assert (len(data.train), len(data.held_out)) == (10, 1)


def test_the_embedded_words_are_fixed():
    data = load_data(DataSpec(train="cmudict"), seed=0)
    assert (len(data.train), len(data.held_out)) == (4000, 400)
    assert data.held_out[0] == {"prompt": "m o n k e y ->", "completion": " M AH NG K IY"}
    assert not set(data.train["prompt"]) & set(data.held_out["prompt"])
    assert "its own held-out words" in refused("cmudict", eval_fraction=0.1)


def test_detecting_a_format_ignores_other_columns():
    assert detect_format(["id", "text"], "x") == "text"
