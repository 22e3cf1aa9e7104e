from __future__ import annotations

import datasets
import pytest

from sft.evaluation.samples import Samples, lines, open_samples
from sft.evaluation.spec import EvaluationSpec


@pytest.fixture
def loaded(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    return model, AutoTokenizer.from_pretrained(tiny_model)


def held_out(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def test_the_first_prompts_are_completed_before_and_after(loaded):
    model, tokenizer = loaded
    rows = held_out(
        prompt=["one two ->", "three ->", "four ->"], completion=[" five", " six", " one"]
    )
    spec = EvaluationSpec(samples=2, max_new_tokens=3)
    samples = open_samples(model, rows, "prompt_completion", tokenizer, spec, 99)
    samples.complete(model, "before")
    first = samples.report()
    assert [s["prompt"] for s in first] == ["one two ->", "three ->"]
    assert [s["reference"] for s in first] == [" five", " six"]
    assert all(s["before"] and s["after"] is None for s in first)
    model.model.norm.weight.data.neg_()
    samples.complete(model, "after")
    assert all(s["before"] != s["after"] for s in samples.report())
    assert lines(samples.report())[0].startswith("  'one two ->' gives '")


def test_text_is_continued_from_its_beginning(loaded):
    rows = held_out(text=["one two three four five six " * 6])
    samples = Samples(rows, "text", loaded[1], EvaluationSpec(), 99)
    (example,) = samples.encoded
    assert len(example.prompt) == 24
    assert example.reference.split()[:2] == ["one", "two"]


@pytest.mark.parametrize(
    ("format", "row", "prompt", "reference"),
    [
        (
            "preference",
            {"prompt": "one ->", "chosen": " two", "rejected": " six"},
            "one ->",
            " two",
        ),
        ("prompt", {"prompt": "one ->", "answer": "two"}, "one ->", "two"),
        ("prompt", {"prompt": "one ->", "answer": 2}, "one ->", None),
    ],
    ids=["preference", "prompt", "no-reference"],
)
def test_other_tasks_have_prompts_as_well(loaded, format, row, prompt, reference):
    rows = held_out(**{key: [value] for key, value in row.items()})
    (sample,) = Samples(rows, format, loaded[1], EvaluationSpec(), 99).report()
    assert (sample["prompt"], sample["reference"]) == (prompt, reference)


def test_conversations_are_prompts(loaded):
    tokenizer = loaded[1]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    asked, told = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
    for format, row in (
        ("prompt", {"prompt": [asked]}),
        ("messages", {"messages": [asked, told]}),
        ("preference", {"prompt": [asked], "chosen": [told], "rejected": [asked]}),
        ("preference", {"chosen": [asked, told], "rejected": [asked, asked]}),
    ):
        rows = held_out(**{key: [value] for key, value in row.items()})
        (example,) = Samples(rows, format, tokenizer, EvaluationSpec(), 99).encoded
        given = tokenizer("user one assistant")["input_ids"]
        assert example.prompt[: len(given)] == given, format


def test_nothing_is_completed_where_nothing_can_be(loaded):
    from transformers import LlamaForSequenceClassification

    model, tokenizer = loaded
    rows = held_out(prompt=["one ->"], completion=[" two"])
    given = ("prompt_completion", tokenizer)
    assert open_samples(model, None, *given, EvaluationSpec(), 9) is None
    assert open_samples(model, rows, *given, EvaluationSpec(samples=0), 9) is None
    classifier = LlamaForSequenceClassification(model.config)
    assert open_samples(classifier, rows, *given, EvaluationSpec(), 9) is None


def test_long_texts_are_cut_in_a_line():
    (line,) = lines([{"prompt": "a " * 100, "before": None, "after": "b"}], width=10)
    assert line == "  'a a a a...' gives 'b' (was '')"
