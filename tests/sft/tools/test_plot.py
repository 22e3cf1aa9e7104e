"""Pictures of runs and adapters: which curves, and files that are whole."""

from __future__ import annotations

import json

import pytest

from sft.errors import UserError
from sft.tools.plot import plot, read_log

pytest.importorskip("matplotlib")


@pytest.fixture
def run_folder(saved, tmp_path):
    """A run with an adapter and the log of four steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    saved("one").rename(folder / "adapter")
    lines = [
        {"time": float(s), "step": s, "epoch": s / 4, "loss": 5.0 - s, "learning_rate": 1e-3 / s}
        for s in range(1, 5)
    ]
    lines[1:1] = [{"step": 1, "event": "reselected", "moved": 5}]
    lines += [{"step": s, "eval_loss": 6.0 - s, "eval_accuracy": s / 5} for s in (2, 4)]
    lines += [{"step": 4, "eval_f1": 0.5, "note": "text", "grad_norm": float("nan")}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_log_becomes_series(run_folder) -> None:
    found = read_log(run_folder / "log.jsonl")
    assert found["loss"] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert found["eval_loss"] == [(2, 4.0), (4, 2.0)]
    assert not found.keys() & {"step", "epoch", "time", "moved", "event", "note", "grad_norm"}


def test_a_run_is_drawn_with_its_map(run_folder, tmp_path) -> None:
    drawn = plot(run_folder, tmp_path / "run.png")
    assert drawn == ["loss", "learning_rate", "accuracy", "|delta| by layer and type"]
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["spiel", "sora"])
def test_an_adapter_is_drawn_as_a_map(saved, tmp_path, method) -> None:
    assert plot(saved("one", method), tmp_path / "map.svg") == ["|delta| by layer and type"]
    text = (tmp_path / "map.svg").read_text()
    assert text.startswith("<?xml") and f"{method}: root mean square" in text


def test_what_cannot_be_drawn_is_said(run_folder, saved, tmp_path) -> None:
    with pytest.raises(UserError, match=r"--out: got run\.gif, allowed are \.png, \.svg, \.pdf"):
        plot(run_folder, tmp_path / "run.gif")
    with pytest.raises(UserError, match="cannot be written"):
        plot(run_folder, tmp_path / "no" / "run.png")
    with (run_folder / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')  # cut short by a kill: left out
    assert plot(run_folder, tmp_path / "cut.png")
    with (run_folder / "log.jsonl").open("a") as log:
        log.write("\n")
    with pytest.raises(UserError, match=r"log\.jsonl:9: is no log line"):
        plot(run_folder, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()
