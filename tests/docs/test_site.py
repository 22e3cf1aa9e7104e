"""The site builds without a warning, and the reference names everything that is public."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import sft

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "quickstart.html").is_file()


def test_every_page_is_in_the_contents() -> None:
    listed = re.findall(r"^([\w-]+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    pages = {page.stem for page in ROOT.glob("docs/*.md")} - {"index"}
    assert pages <= set(listed), pages - set(listed)


def test_the_reference_names_what_is_public() -> None:
    page = (ROOT / "docs/api.md").read_text()
    named = set(re.findall(r":: sft\.(\w+)$", page, re.MULTILINE))
    assert set(sft.__all__) - {"__version__"} <= named, set(sft.__all__) - named
