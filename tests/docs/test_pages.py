"""Every snippet of every page runs, on tiny models under the names that the pages use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory) -> dict[str, str | None]:
    """Run all pages once."""
    folder = tmp_path_factory.mktemp("pages")
    script = Path(__file__).with_name("run_pages.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder), *PAGES],
        capture_output=True, text=True, check=False, env={**os.environ, "SFT_KERNELS": "auto"},
    )  # fmt: skip
    result = folder / "result.json"
    assert result.is_file(), done.stderr[-4000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(page, mistakes) -> None:
    assert mistakes[page] is None, mistakes[page]
