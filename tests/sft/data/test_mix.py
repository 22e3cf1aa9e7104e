"""Sources are mixed by weight and seed; nothing that is held out is trained on."""

from __future__ import annotations

from collections import Counter

import pytest

from sft.data.equal import key_of
from sft.data.mix import apportion


@pytest.fixture
def sources(jsonl):
    """Two hundred rows of a, a hundred of b."""
    return [
        {"path": str(jsonl(f"{name}.jsonl", *[{"text": f"{name}{i}"} for i in range(size)]))}
        for name, size in (("a", 200), ("b", 100))
    ]


def counts(rows) -> Counter[str]:
    return Counter(row["text"][0] for row in rows)


def test_sources_without_weights_follow_one_another(sources, load):
    found = load(sources)
    assert counts(found.train) == {"a": 200, "b": 100}
    assert found.train["text"][200] == "b0"
    assert [source["rows"] for source in found.sources] == [200, 100]


def test_weights_are_shares_of_what_is_drawn(sources, load):
    sources[0]["weight"], sources[1]["weight"] = 1.0, 3.0
    found = load(sources)
    drawn = counts(found.train)
    assert drawn["b"] == 100  # the first to be used up
    assert 0.65 < drawn["b"] / drawn.total() < 0.85
    assert load(sources).train["text"] == found.train["text"]
    assert load(sources, seed=1).train["text"] != found.train["text"]
    assert [source["weight"] for source in found.sources] == [0.25, 0.75]
    whole = counts(load(sources, mixing="all_exhausted").train)
    assert whole["a"] >= 200
    assert whole["b"] > 300  # drawn again and again


def test_streams_are_mixed_alike(sources, load):
    sources[0]["weight"], sources[1]["weight"] = 1.0, 3.0
    found = load(sources, streaming=True)
    first = [row["text"] for row in found.train.take(100)]
    assert 0.6 < sum(text[0] == "b" for text in first) / 100 < 0.9
    again = load(sources, streaming=True)
    assert [row["text"] for row in again.train.take(100)] == first


def test_a_part_of_a_source_is_drawn_by_seed(sources, load, refused):
    sources[0]["fraction"], sources[1]["examples"] = 0.1, 5
    found = load(sources)
    assert counts(found.train) == {"a": 20, "b": 5}
    assert load(sources, seed=1).train["text"] != found.train["text"]
    sources[0]["fraction"] = 0.001
    assert "data.train.0.fraction: got 0.001" in refused(sources)


def test_every_source_is_held_out_in_its_share(sources, load):
    found = load(sources, eval_fraction=0.1)
    assert counts(found.held_out) == {"a": 20, "b": 10}
    assert not set(found.train["text"]) & set(found.held_out["text"])
    sources[0]["weight"], sources[1]["weight"] = 1.0, 3.0
    weighted = load(sources, eval_examples=40)
    assert counts(weighted.held_out) == {"a": 10, "b": 30}
    assert not set(weighted.train["text"]) & set(weighted.held_out["text"])


def test_whole_numbers_are_shared_out():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [0.5, 0.25, 0.25]) == [3, 2, 2]


def test_copies_of_held_out_rows_are_dropped_and_counted(jsonl, load):
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    tool = {"messages": [*chat["messages"], {"role": "tool", "content": "z", "name": "f"}]}
    train, other = jsonl("a.jsonl", chat, tool, chat), jsonl("b.jsonl", chat)
    for streaming in (False, True):
        found = load(train, eval=str(other), streaming=streaming)
        assert [len(row["messages"]) for row in found.train] == [3]
    assert load(train, eval=str(other)).dropped == 2


def test_what_is_missing_makes_no_difference():
    assert key_of({"a": [{"x": 1, "y": None}], "b": None}) == key_of({"a": [{"x": 1}]})
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of({"a": "1"}) != key_of({"a": 1})


def test_chats_of_other_formats_become_messages(jsonl, load):
    alpaca = jsonl("a.jsonl", {"instruction": "x", "output": "y"})
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "z"}]
    found = load([str(alpaca), str(jsonl("b.jsonl", {"conversations": turns}))])
    assert found.format == "messages"
    assert [row["messages"][-1]["content"] for row in found.train] == ["y", "z"]


def test_formats_that_do_not_mix_are_refused(jsonl, refused):
    text, chosen = (
        jsonl("a.jsonl", {"text": "x"}),
        jsonl("b.jsonl", {"chosen": "a", "rejected": "b"}),
    )
    assert "sources of several formats" in refused([str(text), str(chosen)])
    assert "data.eval: got preference examples" in refused(text, eval=str(chosen))
    assert "sources of several formats" in refused([str(text), str(chosen)], streaming=True)


def test_embedded_words_mix_with_files(jsonl, load):
    path = jsonl("a.jsonl", {"prompt": "x", "completion": "y"})
    found = load(["cmudict", str(path)], eval_examples=10)
    assert len(found.train) + len(found.held_out) == 4001
    assert len(load(path, eval="cmudict").held_out) == 400  # the words that are held out


def test_a_source_without_a_weight_weighs_1():
    from sft.data.mix import weights
    from sft.data.spec import SourceSpec

    sources = [SourceSpec(path="a", weight=3.0), SourceSpec(path="b")]
    assert weights(sources) == [0.75, 0.25]


def test_sources_of_one_length_are_not_limited_to_the_same_rows(jsonl, load):
    paths = [jsonl(f"{n}.jsonl", *({"text": f"{n}{i}"} for i in range(50))) for n in "ab"]
    found = load([{"path": str(path), "examples": 10} for path in paths]).train["text"]
    rows = [{text[1:] for text in found if text[0] == n} for n in "ab"]
    assert [len(r) for r in rows] == [10, 10] and rows[0] != rows[1]
