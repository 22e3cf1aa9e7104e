"""Imports point one way: kernels <- {adapters, optim} <- sft. Nothing is run, sources are read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"kernels", "adapters", "optim", "recipes"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "adapters": {"kernels", "adapters"},
    "optim": {"kernels", "optim"},
}


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a module of `package` imports.

    `from a import b` counts as `a.b`, since b may be a module; a literal handed to
    `import_module` counts too.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = (
                node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            )
            first = node.args[0]
            if name in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def violations(source: str, package: str) -> list[str]:
    """What a module of `package` (such as "sft.kernels") imports against the law."""
    root, room = [*package.split("."), ""][:2]
    if root != "sft":
        room = ""  # tests of a room may use all rooms
    found = []
    for line, name in imported(source, package):
        parts = name.split(".")
        if parts[0] in ROOMS:
            found.append(f"{line}: {name} (import it as sft.{parts[0]})")
        elif parts[0] == "sft" and room in MAY_IMPORT:
            home = parts[1] if len(parts) > 1 else "sft itself"
            if home not in MAY_IMPORT[room]:
                found.append(f"{line}: {name} ({room} may import {sorted(MAY_IMPORT[room])})")
    return found


def modules() -> list[Path]:
    """Every Python file of the tree, each once: the links inside sft/ are not followed."""
    folders = [*MAY_IMPORT, "sft", "recipes", "tests", "benchmarks", "scripts"]
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    linked = [ROOT / "sft" / room for room in ROOMS]
    return [file for file in files if not any(link in file.parents for link in linked)]


def package_of(file: Path) -> str:
    """Dotted package of a file, as it is imported."""
    parts = file.relative_to(ROOT).parent.parts
    return ".".join(parts if parts[0] not in ROOMS else ("sft", *parts))


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    assert violations(file.read_text(encoding="utf-8"), package_of(file)) == []


@pytest.mark.parametrize("room", ["kernels", "sft"])
def test_the_tree_was_found(room: str) -> None:
    assert any(room in file.relative_to(ROOT).parts for file in modules())


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import sft.adapters.registry", "sft.kernels"),
        ("from sft import adapters", "sft.kernels"),
        ("from sft import __version__", "sft.kernels"),
        ("import sft", "sft.optim"),
        ("from ..adapters import registry", "sft.kernels"),
        ("from .. import optim", "sft.adapters"),
        ("from ...optim.adamw import SparseAdamW", "sft.adapters.methods"),
        ("from sft.optim.adamw import SparseAdamW", "sft.adapters.methods"),
        ("from sft.adapters.base import Tuner", "sft.optim"),
        ("from sft.trainer import SparseTrainer", "sft.adapters"),
        ("def late():\n    import sft.adapters.base", "sft.optim"),
        ("importlib.import_module('sft.optim.adamw')", "sft.kernels"),
        ("if TYPE_CHECKING:\n    from sft.optim import adamw", "sft.adapters"),
        ("import kernels", "sft"),
        ("from adapters.methods import spiel", "tests.adapters"),
        ("import optim.adamw as o", "sft.optim"),
        ("from recipes import quickstart", "benchmarks"),
    ],
)
def test_a_planted_violation_is_caught(source: str, package: str) -> None:
    assert len(violations(source, package)) == 1


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from sft.kernels.gather import gather", "sft.adapters.methods"),
        ("from .gather import gather", "sft.kernels"),
        ("from . import gather", "sft.kernels"),
        ("from ..kernels import gather", "sft.optim"),
        ("from sft.adapters import registry\nfrom sft.optim import adamw", "sft"),
        ("from torch import optim\nimport torch.optim", "sft.kernels"),
        ("importlib.import_module(name)", "sft.adapters"),
    ],
)
def test_a_lawful_import_passes(source: str, package: str) -> None:
    assert violations(source, package) == []


def test_no_file_on_the_path_is_taken_for_another_package() -> None:
    """Transformers imports `kernels`: it would run a benchmark of this name in its place."""
    for folder in ("benchmarks", "tests/kernels"):
        assert not list((ROOT / folder).glob("kernels*/")) + list((ROOT / folder).glob("kernels.*"))
