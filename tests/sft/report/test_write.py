"""What `sft report` writes: the page and the plots, whole or not at all."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from sft.cli import app
from sft.errors import UserError
from sft.report import write
from sft.report.write import write_report
from sft.run import folder as run_files


def test_the_report_is_a_function_of_the_folder(run_folder):
    folder = run_folder()
    first = write_report(folder, plots=False)
    assert first == [f"report in {folder / 'report.html'}"]
    page = (folder / "report.html").read_bytes()
    write_report(folder, plots=False)
    assert (folder / "report.html").read_bytes() == page
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.json", "recipe.yaml", "log.jsonl", "report.html"}


def test_plots_are_drawn_where_matplotlib_is(run_folder):
    pytest.importorskip("matplotlib")
    folder = run_folder()
    said = write_report(folder)
    drawn = {path.name for path in (folder / "plots").iterdir()}
    assert drawn == {
        "loss.png", "exact_match.png", "rewards_mean.png", "learning_rate.png", "grad_norm.png",
        "tokens_per_second.png", "peak_memory.png", "churn.png", "ranks.png", "density.png",
        "change.png", "churn_by_module.png", "ranks_by_module.png",
    }  # fmt: skip
    assert said[1] == f"{len(drawn)} plots in {folder / 'plots'}"
    for path in (folder / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_line_says_so(run_folder, monkeypatch):
    monkeypatch.setattr(write, "can_plot", lambda: False)
    folder = run_folder()
    assert "pip install 'sparse-sft[plot]'" in write_report(folder)[1]
    assert (folder / "report.html").is_file()
    assert not (folder / "plots").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no run, neither run\.json nor log\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_record_is_refused_and_the_old_page_stays(run_folder):
    folder = run_folder()
    write_report(folder, plots=False)
    page = (folder / "report.html").read_bytes()
    (folder / "run.json").write_text('{"steps": ')
    with pytest.raises(UserError, match=r"run\.json: is not JSON"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == page


def test_the_command(run_folder, tmp_path):
    folder = run_folder()
    done = CliRunner().invoke(app, ["report", str(folder), "--no-plots"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"report in {folder / 'report.html'}\n"
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert refused.exit_code == 2
    assert len(refused.stderr.splitlines()) == 1


def test_a_new_run_clears_the_former_ones_report(run_folder):
    folder = run_folder()
    write_report(folder, plots=False)
    (folder / "notes.txt").write_text("mine")
    run_files.clear(folder, keep_checkpoints=True)
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "log.jsonl", "notes.txt"}
    run_files.clear(folder, keep_checkpoints=False)
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "notes.txt"}
