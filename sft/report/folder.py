"""The folder of a run, as its report reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError, one_line
from sft.report.lines import Line, read_lines
from sft.run.folder import LOG, RECIPE, RECORD

Section = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """What a run has left so far; a run that was cut short has no record yet."""

    path: Path
    record: Section  # run.json
    recipe: Section
    recipe_text: str
    lines: list[Line]

    def section(self, name: str) -> Section:
        """Return a section of run.json, empty where the run has none."""
        found = self.record.get(name)
        return found if isinstance(found, dict) else {}

    def part(self, name: str) -> Section:
        """Return a section of the recipe."""
        found = self.recipe.get(name)
        return found if isinstance(found, dict) else {}


def read_run(path: Path) -> RunFolder:
    """Read the folder of a run.

    Raises:
        UserError: it holds no run, or a file of it is broken.
    """
    if not (path / RECORD).is_file() and not (path / LOG).is_file():
        raise UserError(
            f"{path}: holds no run, neither {RECORD} nor {LOG}; give the training.output_dir of one"
        )
    record = _read_json(path / RECORD)
    text = (path / RECIPE).read_text(encoding="utf-8") if (path / RECIPE).is_file() else ""
    recipe = record.get("recipe") or _read_yaml(path / RECIPE, text)
    return RunFolder(path, record, recipe, text, read_lines(path / LOG))


def _read_json(path: Path) -> Section:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: is not JSON ({one_line(error)}); remove it, or train again"
        ) from None
    return found if isinstance(found, dict) else {}


def _read_yaml(path: Path, text: str) -> Section:
    import yaml

    try:
        found = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML ({one_line(error)}); mend or remove it") from None
    return found if isinstance(found, dict) else {}
