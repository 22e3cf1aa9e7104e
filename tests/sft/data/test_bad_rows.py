"""A malformed row is named by file, line and what is wrong; or it is left out, and listed."""

from __future__ import annotations

import pytest

from sft.data.summary import skipped

GOOD = {"prompt": "a", "completion": "b"}
USER = {"role": "user", "content": "x"}
ASSISTANT = {"role": "assistant", "content": "x"}
CASES = {
    "not_json": ('{"prompt": "a"', "not valid JSON (Expecting ',' delimiter"),
    "a_list": ("[1]", "expected one JSON object a line, found list"),
    "missing": ({"prompt": "a"}, "'completion' is missing"),
    "number": ({"prompt": "a", "completion": 7}, "'completion' holds 7 (int); expected a text"),
}
BAD = {
    "no_role": ({"messages": [{"content": "x"}]}, "messages: message 1: "),
    "nobody_speaks": ({"messages": [USER]}, "messages: no message is the assistant's"),
    "no_turns": ({"conversations": []}, "conversations: [] (list)"),
    "a_stranger": (
        {"conversations": [{"from": "alien", "value": "x"}]},
        "conversations: turn 1: from: got 'alien', allowed is system, human",
    ),
    "equal": ({"chosen": "x", "rejected": "x"}, "chosen and rejected are the same"),
    "no_label": ({"text": "x", "label": None}, "'label' is missing"),
    "tags": ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens have 1 tags"),
    "answer": (
        {"question": "x", "choices": ["y", "z"], "answer": 2},
        "answer: got 2, allowed is 0 to 1, a letter, or a choice",
    ),
    "labels": ({"input_ids": [1, 2], "labels": [1]}, "labels: got 1 of them for 2 input_ids"),
    "half_a_chat": ({"prompt": [USER], "completion": "x"}, "one of prompt and completion is"),
}
BETTER = {
    "messages": {"messages": [USER, ASSISTANT]},
    "conversations": {
        "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "x"}]
    },
    "chosen": {"chosen": "x", "rejected": "y"},
    "text": {"text": "x", "label": 0},
    "tokens": {"tokens": ["a"], "tags": ["O"]},
    "question": {"question": "x", "choices": ["y", "z"], "answer": 1},
    "input_ids": {"input_ids": [1], "labels": [1]},
    "prompt": {"prompt": [USER], "completion": [ASSISTANT]},
}


@pytest.mark.parametrize("case", list(CASES))
def test_lines_are_counted_as_editors_count_them(jsonl, refused, load, case):
    line, reason = CASES[case]
    path = jsonl("a.jsonl", GOOD, "", line, GOOD)
    for streaming in (False, True):
        message = refused(path, streaming=streaming)
        assert message.startswith(f"data.train: {path}:3: ")
        assert reason in message
        assert message.endswith("mend the row, or set data.on_bad_row: skip")


@pytest.mark.parametrize("case", list(BAD))
def test_malformed_rows_are_refused(jsonl, refused, load, case):
    row, reason = BAD[case]
    path = jsonl("a.jsonl", BETTER[next(iter(row))], row)
    assert f"{path}:2: {reason}" in refused(path)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("streaming", [False, True], ids=["at once", "streamed"])
def test_malformed_rows_are_left_out_and_listed(jsonl, load, case, streaming):
    path = jsonl("a.jsonl", GOOD, "", CASES[case][0], GOOD, {"prompt": "c"}, GOOD)
    found = load(path, on_bad_row="skip", streaming=streaming)
    for _ in range(2):  # a second epoch finds no new ones
        assert [dict(row) for row in found.train] == [GOOD] * 3
    bad, _ = found.bad
    assert bad.count == 2
    assert [(row["file"], row["line"]) for row in bad.listed()] == [(str(path), 3), (str(path), 5)]
    assert CASES[case][1] in bad.listed()[0]["reason"]
    assert skipped(found)[0] == "2 malformed rows left out"
    assert f"{path}:3: " in skipped(found)[1]


def test_cells_are_counted_by_the_lines_that_they_begin_on(tmp_path, refused, load):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",b\n\nc,\nd,e\n')
    assert f"{path}:5: 'completion' is missing" in refused(path)
    assert load(path, on_bad_row="skip").train["prompt"] == ["two\nlines", "d"]
    path.write_text("prompt,completion\na,b\nc,d,e\nf,g\n")
    assert f"{path}:3: 3 cells for 2 columns" in refused(path)
    assert load(path, on_bad_row="skip").train["prompt"] == ["a", "f"]


def test_examples_are_counted_where_there_are_no_lines(tmp_path, refused):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a", None]}).to_parquet(tmp_path / "a.parquet")
    assert "a.parquet: example 2: 'text' is missing" in refused(tmp_path / "a.parquet")


def test_held_out_rows_are_named_under_their_own_key(jsonl, refused):
    path, other = jsonl("a.jsonl", GOOD), jsonl("b.jsonl", {"prompt": "a", "completion": None})
    assert refused(path, eval=str(other)).startswith(f"data.eval: {other}:1: ")


def test_only_malformed_rows_are_none(jsonl, refused):
    path = jsonl("a.jsonl", {"prompt": "a", "completion": 1})
    assert "no example is left" in refused(path, on_bad_row="skip")
