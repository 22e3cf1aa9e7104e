"""Bytes that are no text, values that no table holds, ids of no token: one line each."""

from __future__ import annotations

import json

import pytest

ROW = '{"prompt": "a", "completion": "b"}'
CASES = {
    "latin_jsonl": ("a.jsonl", b'{"prompt": "caf\xe9", "completion": "b"}', "not UTF-8 text"),
    "latin_txt": ("a.txt", b"caf\xe9", "not UTF-8 text"),
    "latin_csv": ("a.csv", b"caf\xe9, b", "not UTF-8 text"),
    "half_a_pair": (
        "a.jsonl", b'{"prompt": "\\ud800", "completion": "b"}', "half a character (one",
    ),
    "too_deep": ("a.jsonl", b"[" * 100_000, "not valid JSON (lists or objects too deep"),
    "too_long": ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "not valid JSON (a number of"),
}  # fmt: skip
AROUND = {"a.jsonl": (ROW, ROW), "a.txt": ("a", "b"), "a.csv": ("prompt,completion", "x, y")}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("streaming", [False, True])
def test_a_line_that_is_no_text_is_named_or_left_out(tmp_path, load, refused, case, streaming):
    name, line, reason = CASES[case]
    before, after = (text.encode() for text in AROUND[name])
    path = tmp_path / name
    path.write_bytes(b"\n".join([before, line, after, b""]))
    message = refused(path, streaming=streaming)
    assert message.startswith(f"data.train: {path}:2: {reason}"), message
    found = load(path, streaming=streaming, on_bad_row="skip")
    assert len(list(found.train)) == (1 if name == "a.csv" else 2)
    assert [row.line for row in found.bad[0].rows] == [2]


def test_names_of_columns_are_text_and_differ(tmp_path, refused):
    path = tmp_path / "a.csv"
    for names, wrong in ((b"pr\xe9,b", "not UTF-8 text"), (b"a,b,a", "two columns are called 'a'")):
        path.write_bytes(names + b"\n1,2,3\n")
        assert refused(path).startswith(f"data.train: {path}:1: {wrong}; ")


def test_a_file_of_which_every_line_is_wrong_names_the_first(tmp_path, refused):
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{ROW}\n{ROW}\n".encode("utf-16"))
    assert refused(path).startswith(f"data.train: {path}:1: not UTF-8 text; ")


def test_the_first_row_may_lack_a_column_too(jsonl, tmp_path, load, refused):
    path = jsonl("a.jsonl", {"prompt": "a"}, "nonsense", ROW)
    assert refused(path).startswith(f"data.train: {path}:1: 'completion' is missing")
    assert len(load(path, on_bad_row="skip").train) == 1
    table = tmp_path / "a.csv"
    table.write_text("prompt,completion\na\nb, c\nd,e,f\n")
    assert refused(table).startswith(f"data.train: {table}:2: 'completion' is missing")
    assert len(load(table, on_bad_row="skip").train) == 1


def test_values_that_no_column_holds_are_refused(jsonl, refused):
    path = jsonl(
        "a.jsonl", {"prompt": "a", "answer": "b"}, "nonsense", {"prompt": "a", "answer": [1]}
    )
    message = refused(path, formats=("prompt",), on_bad_row="skip")
    assert message.startswith(f"data.train: {path}: values of one column are of several types")


def test_labels_are_ids_or_left_out(jsonl, refused):
    path = jsonl("a.jsonl", {"input_ids": [1, 2], "labels": [-100, -1]})
    assert f"{path}:1: labels: got -1, allowed is -100 (no label), or an id" in refused(path)


@pytest.mark.parametrize("column", ["input_ids", "labels"])
@pytest.mark.parametrize("key", ["train", "eval"])
def test_ids_are_of_the_model(jsonl, load, column, key):
    from torch import nn

    from sft.data.vocabulary import check_ids
    from sft.errors import UserError

    class Model(nn.Module):
        def get_input_embeddings(self):
            return nn.Embedding(10, 2)

    good, bad = ({"input_ids": [1, 2], "labels": [-100, n]} for n in (9, 10))
    if column == "input_ids":
        bad = {"input_ids": [1, 10], "labels": [-100, 9]}
    paths = {
        "train": jsonl("a.jsonl", good),
        "eval": jsonl("b.jsonl", {**good, "input_ids": [3, 4]}),
    }
    check_ids(load(paths["train"], eval=str(paths["eval"])), Model())
    paths[key].write_text(json.dumps(bad))
    found = load(paths["train"], eval=str(paths["eval"]))
    with pytest.raises(UserError, match=rf"^data.{key}: {column}: got 10, allowed is 0 to 9"):
        check_ids(found, Model())
