"""Every kernel on disk has a slow, obvious oracle beside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# Data types: what they compute is tested against dense products in test_outer.py, test_pattern.py.
DATA_TYPES = {"library", "pattern", "outer", "mask"}
OPS = sorted(file.stem for file in KERNELS.glob("*.py") if file.stem not in DATA_TYPES)


def public_functions(name: str) -> set[str]:
    tree = ast.parse((KERNELS / f"{name}.py").read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return {f.name for f in functions if not f.name.startswith("_")}


def oracle(name: str) -> str:
    """`outer_at` -> `outer_at_reference`; families of ops share one: `sparse_linear` -> linear."""
    base = {"topk": "top_k"}.get(name, name)
    return f"{base.removeprefix('sparse_')}_reference"


def test_data_types_define_no_oracle() -> None:
    for name in DATA_TYPES:
        assert not {f for f in public_functions(name) if f.endswith("_reference")}


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_an_oracle(name: str) -> None:
    assert oracle(name) in public_functions(name)


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_test_that_uses_its_oracle(name: str) -> None:
    test = Path(__file__).with_name(f"test_{name}.py")
    assert test.is_file()
    assert oracle(name) in test.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_public(name: str) -> None:
    assert public_functions(name) - {oracle(name)}
