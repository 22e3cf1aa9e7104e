"""What a log or its names hold cannot break a chart, nor end a resumed run twice."""

from __future__ import annotations

from sft.report.charts import Chart, Series
from sft.report.lines import keep_until, read_lines, to_line
from sft.report.svg import svg


def test_names_in_a_chart_are_escaped() -> None:
    evil = '<script>"&'
    chart = Chart("k", evil, [Series(evil, [(0, 1.0), (1, 2.0)])], show=lambda _: evil)
    drawn = str(svg(chart))
    assert "<script" not in drawn and "&lt;script&gt;&quot;&amp;" in drawn


def test_a_run_that_ended_and_goes_on_has_not_ended(tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"step": 4, "loss": 1.0}, {"step": 4, "event": "ended"}, {"step": 5, "loss": 0.5}]
    log.write_text("".join(map(to_line, lines)), encoding="utf-8")
    assert keep_until(log, 4) == lines[:1] == read_lines(log)
