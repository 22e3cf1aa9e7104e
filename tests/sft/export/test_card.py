"""Model cards tell what a run did, and nothing of the machine it ran on."""

from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import ModelCard

import sft
from sft.export.card import Facts, licence_of, read_run, write_card
from sft.export.forms import FORMS, Request, export

RECIPE = {
    "model": {"name": "org/base"},
    "method": {"name": "spiel", "density": 0.01, "num_weights": None},
    "data": {"train": "/private/place/rows.jsonl"},
    "training": {"learning_rate": 0.001, "output_dir": "/private/run", "optim": None},
    "seed": 3,
}  # fmt: skip
RECORD = {
    "before": {"nll": 3.25}, "after": {"nll": 1.5, "exact_match": 0.5}, "trained_weights": 100,
    "all_weights": 10_000, "steps": 5, "versions": {"torch": "2.13"},
    "data": {"train": 64, "held_out": 8},
    "forgetting": {"text": "general", "kl": 0.125, "loss_before": 2.0},
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "run.json").write_text(json.dumps(RECORD))
    return folder


def test_a_card_tells_base_method_settings_data_and_results(run, tmp_path) -> None:
    facts = Facts("merged", "org/base", "LlamaForCausalLM", **read_run(run))
    write_card(tmp_path, facts, "mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["sparse-sft", "spiel", "merged"]
    for line in (
        "# mine",
        'model = LlamaForCausalLM.from_pretrained("mine")',
        "100 of 10,000 weights were trained (1 %), 5 steps.",
        "Data: `rows.jsonl`: 64 examples to train on, 8 held out.",
        "| method.density | 0.01 |",
        "| training.learning_rate | 0.001 |",
        "| seed | 3 |",
        "Versions: torch 2.13.",
        "| nll | 3.25 | 1.5 |",
        "| exact_match |  | 0.5 |",
        "| kl | 0.125 |",
        "The licence of the base model, `org/base`, applies; see there.",
    ):
        assert line in card.text.splitlines() or line in card.text, line
    assert "/private" not in card.content and "num_weights" not in card.content


def test_the_licence_is_that_of_the_base(tmp_path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    assert licence_of(str(base)) is None
    (base / "README.md").write_text("---\nlicense: mit\n---\n\n# base\n")
    assert licence_of(str(base)) == "mit"
    assert licence_of("smollm2-135m-instruct") == "apache-2.0"
    write_card(tmp_path, Facts("lora", str(base)))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder's path says nothing to others
    assert str(tmp_path) not in card.content


def test_every_form_has_a_card_whose_snippet_is_python(byte_base, adapter_on, tmp_path) -> None:
    adapter = adapter_on(byte_base, sft.S2FTConfig(density=0.1, task_type="CAUSAL_LM"))
    for form in FORMS:
        to = tmp_path / f"as-{form}"
        export(adapter, form, Request(to=to, verify=False), lambda _: None)
        card = ModelCard.load(to / "README.md")
        assert form in card.data.tags and "s2ft" in card.data.tags
        snippet = card.content.split("```python\n")[1].split("```")[0]
        assert compile(snippet, form, "exec") and to.name in snippet


def test_a_run_without_a_record_has_a_card_all_the_same(run, tmp_path) -> None:
    (run / "run.json").unlink()
    write_card(tmp_path, Facts("adapter", "smollm2-135m-instruct", **read_run(run)))
    content = (tmp_path / "README.md").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in content
    assert 'folder_of("smollm2-135m-instruct")' in content  # not the published weights
    assert read_run(None) == {}
