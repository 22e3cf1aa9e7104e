"""Files laid out for LLaMA-Factory are read as they are."""

from __future__ import annotations

import json

import pytest

from sft.data.load import load_data
from sft.data.spec import DataSpec

ALPACA = {"instruction": "add", "input": "1 2", "output": "3", "system": "be short"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}],
    "system": "count",
}
MAPPED = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ALPACA, ["be short", "add\n\n1 2", "3"]),
        (SHAREGPT, ["count", "one", "two"]),
        (MAPPED, ["one", "two"]),
    ],
    ids=["alpaca", "sharegpt", "messages"],
)
def test_conversations_are_recognised_by_their_columns(tmp_path, row, said):
    path = tmp_path / "demo.json"
    path.write_text(json.dumps([row, {key: swapped(value) for key, value in row.items()}]))
    spec = DataSpec(train=str(path), eval_examples=1)
    found = load_data(spec, 0, ("messages", "prompt_completion", "text"))
    texts = [json.dumps(one[0]) for one in (found.train, found.held_out)]
    (text,) = [text for text in texts if "other" not in text]
    places = [text.find(json.dumps(words)[1:-1]) for words in said]
    assert places == sorted(places) and places[0] >= 0


def swapped(value):
    """Another text, or conversation, of the same shape."""
    if isinstance(value, str):
        return f"other {value}"
    return [{**turn, "value" if "from" in turn else "content": "other"} for turn in value]


def test_preferences_take_their_prompt_from_two_columns(tmp_path):
    path = tmp_path / "pairs.json"
    row = {"instruction": "add", "input": "1 2", "chosen": "3", "rejected": "4"}
    path.write_text(json.dumps([row, row | {"input": "2 2"}]))
    source = {"path": str(path), "columns": {"prompt": "{instruction}\n{input}"}}
    spec = DataSpec(train=[source], eval_examples=1)
    found = load_data(spec, 0, ("preference",)).train[0]
    assert {key: found[key] for key in ("prompt", "chosen", "rejected")} == {
        "prompt": f"add\n{found['prompt'][-3]} 2", "chosen": "3", "rejected": "4",
    }  # fmt: skip
