"""What the pages promise is so: commands, recipes, versions, file sizes, no litter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE = 400
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


def tracked() -> list[Path]:
    """Files under version control, links left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and not file.is_symlink()]


def text(name: str) -> str:
    """Content of a file named from the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def version() -> str:
    """`__version__` of the package, read without importing it."""
    for node in ast.parse(text("sft/__init__.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise AssertionError("sft/__init__.py assigns no __version__")


def test_the_versions_agree() -> None:
    assert f'\nversion = "{version()}"\n' in text("pyproject.toml")
    assert f"\n## [{version()}]" in text("CHANGELOG.md")
    assert "\n## [Unreleased]\n" in text("CHANGELOG.md")


@pytest.mark.parametrize("page", PAGES)
def test_named_commands_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:^ +|`|^```bash\n)make ([a-z-]+)", text(page), re.MULTILINE))
    assert named <= targets, named - targets


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text(page))
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    recipes = re.findall(r"\brecipes/[\w-]+\.yaml", text(page))
    assert missing + [recipe for recipe in recipes if not (ROOT / recipe).is_file()] == []


def test_the_readme_names_the_two_commands() -> None:
    assert {"quickstart", "test"} <= set(re.findall(r"^make ([a-z-]+)", text("README.md"), re.M))


def test_ci_runs_the_suite() -> None:
    assert text(".ci/run").splitlines()[-1] == "make test"


def test_files_stay_short() -> None:
    sizes = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in tracked()
        if file.suffix in {".py", ".sh", ".md", ".yaml"} or file.name == "Makefile"
    }
    assert {name: size for name, size in sizes.items() if size > LONGEST_FILE} == {}


# The words are broken up, or this file would be its own first finding.
LITTER = re.compile(r"\b(?:TO)DO\b|\b(?:FIX)ME\b|(?<![\w.])/(?:home|root|work|opt|tmp|Users)/\w")


def test_no_litter() -> None:
    """No machine's paths, no reminders: what is left to do is not kept in the source."""
    found = []
    for file in tracked():
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # data, not text
        name = file.relative_to(ROOT)
        if name.parts[:2] == ("sft", "builtin"):
            continue  # other people's prose
        found += [f"{name}:{n}: {line}" for n, line in enumerate(lines, 1) if LITTER.search(line)]
    assert found == []


@pytest.mark.parametrize("name", ["quickstart", "test", "test-quick", "lint", "types", "clean"])
def test_every_target_is_explained(name: str) -> None:
    assert re.search(rf"^{name}:.*## \w", text("Makefile"), re.MULTILINE)


def test_constraints_name_releases_only() -> None:
    lines = [line.partition("#")[0].strip() for line in text("constraints.txt").splitlines()]
    for line in filter(None, lines):
        assert re.fullmatch(r"[\w.-]+==[\d.]+(; python_version >= \"3\.\d+\")?", line), line


def test_every_figure_on_the_pages_comes_from_a_result() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/report.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
