"""The page of a run: its sections, what it leaves out, and what anybody can read."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from sft.report.folder import read_run
from sft.report.page import TEMPLATES, page

VOID = {"meta", "br"}
SECTIONS = {
    "headline", "curves", "forgetting", "samples", "course", "support", "data", "made",
}  # fmt: skip


class Reader(HTMLParser):
    """Checks that elements nest; keeps the names of sections and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.text, self.marked, self.names = [], [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        given = dict(attributes)
        if tag == "h2":
            self.headings.append(given["id"])
        if tag == "svg":
            assert given.get("aria-label") or given.get("aria-hidden")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "mark":
            self.marked.append(data)


def read(folder):
    html = page(read_run(folder))
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    reader.all = " ".join(" ".join(reader.text).split())
    return reader, html


def test_a_whole_run_has_every_section(run_folder):
    reader, _ = read(run_folder())
    assert set(reader.headings) == SECTIONS
    for words in (
        "spiel of tiny", "0.8125 was 0.05", "0.789 % of 135 M", "1.06 M", "1 min 5 s",
        "the loss rose by 0.2 nats", "12.2", "M AO", "rows.jsonl", "completion: got null",
        "# <base>", "Open ranks of a module", "Support churn", "Size of the change", "abababab",
        "choices accuracy 0.375 was 0.25", "61 the first ones are listed", "Label: noun",
        "2 equal ones dropped",
    ):  # fmt: skip
        assert words in reader.all, words


@pytest.mark.parametrize("left_out", ["forgetting", "samples", "support", "data", "versions"])
def test_a_section_without_data_is_left_out(run_folder, left_out):
    changes = {left_out: None}
    reader, _ = read(run_folder(**changes))
    gone = {left_out} - {"support", "versions"}  # ranks and the recipe remain in these
    assert set(reader.headings) == SECTIONS - gone
    assert ("Versions" in reader.all) == (left_out != "versions")
    assert ("Size of the change" in reader.all) == (left_out != "support")


def test_a_run_that_was_cut_short_has_a_page(run_folder):
    folder = run_folder()
    (folder / "run.json").unlink()
    reader, _ = read(folder)
    assert "its log reaches update 9" in reader.all
    assert set(reader.headings) == {"headline", "curves", "course", "support", "made"}


def test_a_run_without_a_log_has_a_page(run_folder):
    folder = run_folder()
    (folder / "log.jsonl").unlink()
    reader, _ = read(folder)
    assert set(reader.headings) == SECTIONS - {"curves", "course"}


def test_nothing_is_fetched_and_nothing_executed(run_folder):
    reader, html = read(run_folder())
    assert reader.names.isdisjoint({"script", "link", "img", "iframe", "object"})
    for word in ("src=", "href=", "@import", "url(", "http"):
        assert word not in html
    assert "&lt;script&gt;x" in html  # what a model wrote is text


def test_the_loss_mask_is_marked(run_folder):
    reader, _ = read(run_folder())
    assert [text for text in reader.marked if text != "marked and underlined"] == [" A B"]
    assert "a <b> ->" in reader.all


def test_forgetting_within_the_threshold_is_no_alert(run_folder):
    found = dict(read_run(run_folder()).section("forgetting"))
    reader, html = read(run_folder(forgetting=found | {"loss_after": 2.55, "alert": False}))
    assert "Within the threshold: the loss rose by 0.05 nats" in reader.all
    assert 'class="alert"' not in html


def colours(mode):
    """Return the colours of the page by name, in one of its two modes."""
    css = (TEMPLATES / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[("light", "dark").index(mode)]))


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_curves_stand_out(mode):
    found = colours(mode)
    pairs = [(ink, paper) for ink in ("ink", "muted") for paper in ("page", "surface")]
    pairs += [("ink", "mark"), ("alert-ink", "alert"), ("fine-ink", "fine")]
    for ink, paper in pairs:  # WCAG 2.2, AA: 4.5 for text, 3 for graphics
        assert contrast(found[ink], found[paper]) >= 4.5, (ink, paper)
    for curve in ("s0", "s1", "s2", "s3", "heat"):
        assert contrast(found[curve], found["surface"]) >= 3, curve
