"""A run leaves what its report is made of, and the report."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from sft.recipe.load import load_recipe
from sft.run.job import train_from_recipe


@pytest.fixture
def go(recipe_file):
    def train(*settings):
        recipe = load_recipe(recipe_file, ["forgetting=false", *settings])
        console = Console(file=io.StringIO(), width=200)
        found = train_from_recipe(recipe, console)
        return found.output_dir, console.file.getvalue()

    return train


def test_a_run_leaves_log_record_and_report(go) -> None:
    folder, printed = go()
    record = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] > 0 for line in lines if "loss" in line] == [True, True]
    assert {line["event"] for line in lines if "event" in line} >= {"began", "reselected"}
    assert record["support"]["trained"] == record["trained_weights"]
    assert record["data"]["train"] == 56
    assert len(record["samples"]) == 3
    assert "<html" in (folder / "report.html").read_text()
    assert f"report in {folder / 'report.html'}" in printed


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_what_has_no_changed_weights_is_reported_without_them(go) -> None:
    name = "method={name: prompt_tuning, num_virtual_tokens: 3}"
    folder, _ = go(name, "export.merged=false")
    assert json.loads((folder / "run.json").read_text())["support"] is None
    assert (folder / "report.html").is_file()
