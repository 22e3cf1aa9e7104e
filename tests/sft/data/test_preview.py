"""What is shown of the first example is what the trainer feeds, and showing it changes nothing."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from sft.data.preview import preview, show
from sft.data.summary import token_lengths

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <end>{% endgeneration %} "
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)
CHAT = {
    "messages": [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": "five"},
    ]
}


@pytest.fixture
def trainer(tiny_model, tiny_tokenizer, tmp_path):
    """Build our SFT trainer over a few rows."""
    import copy

    from datasets import Dataset, IterableDataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    from sft.trainers.supervised import SparseSFTTrainer

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE

    def build(rows, *, streaming=False, **fields):
        data = Dataset.from_list(rows)
        arguments = SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1,
            per_device_train_batch_size=2, **{"activation_checkpointing": False, **fields},
        )  # fmt: skip
        return SparseSFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=arguments,
            train_dataset=IterableDataset.from_generator(lambda: iter(rows)) if streaming else data,
            processing_class=tokenizer,
        )

    return build


PAIR = {"prompt": "one two ->", "completion": " three"}


def test_completions_alone_are_trained_on_where_there_are_prompts(trainer):
    found = preview(trainer([PAIR]))
    assert found["segments"] == [["one two ->", False], [" three <end>", True]]
    assert found["text"] == "one two -> three <end>"
    whole = preview(trainer([PAIR], completion_only_loss=False))
    assert whole["segments"] == [["one two -> three <end>", True]]


def test_only_the_assistant_is_trained_on_when_asked(trainer):
    assert preview(trainer([CHAT]))["segments"] == [["one two three <end> four five <end>", True]]
    found = preview(trainer([CHAT], assistant_only_loss=True))["segments"]
    assert [(text.split(), trained) for text, trained in found] == [
        (["one", "two"], False),
        (["three", "<end>"], True),
        (["four"], False),
        (["five", "<end>"], True),
    ]


def test_packed_rows_are_shown_as_they_are_fed(trainer):
    rows = [PAIR, {"prompt": "four ->", "completion": " five"}]
    built = trainer(rows, packing=True, packing_strategy="wrapped", max_length=16)
    found = preview(built)["segments"]
    assert [trained for _, trained in found] == [False, True, False, True]
    assert "five" in found[3][0]
    assert token_lengths(built.train_dataset)["max"] == 9


def test_packed_examples_do_not_see_one_another_unless_they_are_cut_anywhere(trainer):
    rows = [PAIR, {"prompt": "four ->", "completion": " five six"}]

    def loss(**fields):
        built = trainer(rows, max_length=16, **fields)
        batch = built.data_collator(list(built.train_dataset))
        with torch.no_grad():
            return float(built.compute_loss(built.model, batch))

    apart = loss()
    assert loss(packing=True) == pytest.approx(apart, rel=1e-6)
    assert loss(packing=True, packing_strategy="wrapped") != pytest.approx(apart, rel=1e-4)


def test_ids_are_fed_as_they_are(trainer):
    built = trainer([{"input_ids": [3, 4, 5], "labels": [-100, -100, 5]}])
    assert preview(built)["segments"] == [["zero one", False], [" two", True]]


def test_streams_are_not_used_up(trainer):
    built = trainer([PAIR, CHAT | PAIR][:1] * 2, streaming=True)
    assert preview(built)["segments"][1] == [" three <end>", True]
    built.train()
    assert built.state.global_step == 1
    assert token_lengths(built.train_dataset) is None


def test_nothing_random_is_drawn(trainer):
    built = trainer([PAIR] * 4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    preview(built)
    assert torch.equal(before, torch.get_rng_state())


def test_lengths_are_counted_of_all_rows(trainer):
    built = trainer([PAIR, {"prompt": "one ->", "completion": " two three four"}])
    assert token_lengths(built.train_dataset) == {"mean": 5.5, "p50": 5.5, "p95": 5.95, "max": 6}


def test_pairs_are_shown_both(tiny_model, tiny_tokenizer, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig

    from sft.trainers.preference import SparseDPOTrainer

    row = {"prompt": "one ->", "chosen": " two", "rejected": " three four"}
    built = SparseDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none",
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=tiny_tokenizer,
    )  # fmt: skip
    found = preview(built)["segments"]
    assert [s for s in found if s[1]] == [[" two <end>", True], [" three four <end>", True]]
    assert [s[0] for s in found if not s[1]] == ["chosen: ", "one ->", "\nrejected: ", "one ->"]
    assert token_lengths(built.train_dataset)["max"] == 4


def test_examples_are_printed_with_and_without_colour():
    found = {"text": "ab", "segments": [["a\n", False], ["[b]", True]], "label": "yes"}
    plain, colour = io.StringIO(), io.StringIO()
    show(found, Console(file=plain))
    assert plain.getvalue() == "first example («»: trained on; label: yes)\n  a\n  «[b]»\n"
    show(found, Console(file=colour, force_terminal=True, color_system="standard"))
    assert "\x1b[1;32m[b]" in colour.getvalue()


def test_a_run_prints_and_stores_its_data(recipe_file, tmp_path):
    from sft.recipe.load import load_recipe
    from sft.run.job import train_from_recipe

    printed = io.StringIO()
    overrides = ["export.merged=false", "evaluation.metrics=[nll]", "forgetting=false"]
    train_from_recipe(load_recipe(recipe_file, overrides), Console(file=printed))
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (data["train"], data["held_out"], data["format"]) == (56, 8, "prompt_completion")
    assert data["preview"]["segments"][1][1] is True
    assert data["tokens"]["max"] == 5
    assert data["sources"][0]["rows"] == 56
    text = printed.getvalue()
    assert "first example («»: trained on)" in text
    assert text.index("first example") < text.index("\ntrain ")


def test_a_character_that_two_runs_share_is_whole():
    from sft.data.preview import _decoded

    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", "replace")

    ids = list("aéb".encode())
    assert _decoded(ids, [False, False, True, True], Bytes()) == [("a", False), ("éb", True)]
