"""A tracker gets what log.jsonl gets, and one that is not there is named."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sft.cli import app


def test_a_tracker_is_written_beside_the_log(recipe_file, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    words = ["train", str(recipe_file), "training.report_to=tensorboard", "export.merged=false"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [2, 4]
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("trackoi", "unknown tracker"), ("neptune", "not installed; install it")],
    ids=["unknown", "missing"],
)
def test_a_tracker_that_is_not_there_is_one_line(recipe_file, tmp_path, name, message, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
    done = CliRunner().invoke(app, ["train", str(recipe_file), f"training.report_to={name}"])
    assert done.exit_code == 2
    assert f"training.report_to: got '{name}'" in done.output and message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()
