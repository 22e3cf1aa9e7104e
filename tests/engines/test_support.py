"""docs/engines.md says what its table says, and the tests that its cells name exist."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def table() -> Any:
    spec = importlib.util.spec_from_file_location("support_table", HERE / "support_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def function(test: str) -> tuple[str, str]:
    """Return file and function of a test."""
    path, _, name = test.partition("::")
    return path, name.partition("[")[0]


def test_the_page_is_written_from_the_table(table) -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.page(text) == text, "run python tests/engines/support_table.py"
    for head, rows in table.TABLES.values():
        assert all(len(row) == len(head) for row in rows.values())


def test_every_cell_names_a_test(table) -> None:
    cells = [cell for _, rows in table.TABLES.values() for row in rows.values() for cell in row]
    assert all(cell.tests for cell in cells)


def test_every_named_test_is_in_its_file(table) -> None:
    named = {function(test) for test in table.named_tests()}
    for path in {path for path, _ in named}:
        tree = ast.parse((table.ROOT / path).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {name for file, name in named if file == path} <= defined, path


@pytest.mark.engines
def test_every_named_case_is_collected(table) -> None:
    files = sorted({function(test)[0] for test in table.named_tests()})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", *files],
        cwd=table.ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    cases = set(done.stdout.splitlines())
    functions = {"::".join(function(case)) for case in cases}
    missing = {
        test for test in table.named_tests() if test not in (cases if "[" in test else functions)
    }
    assert not missing, done.stdout[-500:]
