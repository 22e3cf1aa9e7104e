"""Streams are shuffled by seed within a buffer, and read anew each time."""

from __future__ import annotations

import pytest


@pytest.fixture
def numbers(jsonl):
    return jsonl("a.jsonl", *[{"text": str(i)} for i in range(50)])


def texts(found):
    return [row["text"] for row in found.train]


def test_rows_are_shuffled_by_seed(numbers, load):
    found = load(numbers, streaming=True)
    assert sorted(texts(found), key=int) == [str(i) for i in range(50)]
    assert texts(found) == texts(load(numbers, streaming=True))
    assert texts(found) != texts(load(numbers, streaming=True, seed=1))
    near = texts(load(numbers, streaming=True, shuffle_buffer=2))
    assert max(abs(int(text) - place) for place, text in enumerate(near)) < 25


def test_first_rows_are_held_out(numbers, load, refused):
    found = load(numbers, streaming=True, eval_examples=5)
    assert found.held_out["text"] == ["0", "1", "2", "3", "4"]
    assert len(texts(found)) == 45
    assert found.streamed
    assert len(found.first(3)) == 3
    assert len(load(numbers, streaming=True, train_examples=7).first(100)) == 7


def test_embedded_words_stream(load):
    found = load("cmudict", streaming=True)
    assert len(found.held_out) == 400
    assert set(found.first(1)[0]) == {"prompt", "completion"}


def test_parquet_and_folders_stream(tmp_path, load):
    from datasets import Dataset

    (tmp_path / "folder").mkdir()
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "folder" / "train.parquet")
    assert sorted(texts(load(tmp_path / "folder", streaming=True))) == ["a", "b"]


def test_what_needs_all_rows_is_refused(jsonl, numbers, refused):
    labels = jsonl("b.jsonl", {"text": "a", "label": 1})
    assert "data.streaming: got true with classification" in refused(labels, streaming=True)
    part = [{"path": str(numbers), "fraction": 0.5}]
    assert "set examples" in refused(part, streaming=True)
    empty = jsonl("c.jsonl", "")
    assert "holds no examples" in refused(empty, streaming=True)
