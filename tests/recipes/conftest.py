"""`--results FILE`: keep what whole runs of recipes gained and cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="a JSON file of recipes, brought up to date")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--results", default=None)
    if path is not None and not hasattr(config, "workerinput"):  # one process writes
        config.pluginmanager.register(Results(path))


class Results:
    """Writes the property `recipe` of each test that passes, or that misses its promise."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest: of a test in another process as well."""
        found = dict(report.user_properties).get("recipe")
        if report.when == "call" and found is not None:
            self.keep(found)

    def keep(self, found: dict) -> None:
        """Replace one recipe's results in the file."""
        from machine import machine

        old = json.loads(self.path.read_text())["recipes"] if self.path.is_file() else {}
        recipes = dict(sorted({**old, **found}.items()))
        content = {"machine": machine(), "recipes": recipes}
        self.path.write_text(json.dumps(content, indent=1, default=str) + "\n")
