"""Damaged adapters: one line of every tool, and nothing written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sft.cli import app
from sft.tools.algebra import Request
from sft.tools.aligned import align
from sft.tools.change import Change
from sft.tools.compare import compare_change
from sft.tools.compose import compose
from sft.tools.verify import FAILED, verify_adapter

TENSORS = "adapter_model.safetensors"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def spoil(folder, value: float) -> None:
    tensors = load_file(folder / TENSORS)
    name = next(name for name in tensors if name.endswith("delta_values"))
    tensors[name][0] = value
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


@pytest.mark.parametrize("command", ["inspect", "diff", "compose", "plot"])
def test_a_file_that_was_cut_short(saved, tmp_path, command) -> None:
    one, two = saved("one"), saved("two")
    (one / TENSORS).write_bytes((one / TENSORS).read_bytes()[:-100])
    out = ("--out", tmp_path / "o.png")
    words = {"inspect": (one,), "diff": (one, two), "compose": ("add", one, two, *out)}
    found = run(command, *words.get(command, (one, *out)))
    assert found.exit_code == 2, found.output
    (line,) = found.stderr.splitlines()
    assert f"{one / TENSORS}: damaged (" in line and not (tmp_path / "o.png").exists()


def test_values_that_are_not_finite(saved, tmp_path) -> None:
    one, two = saved("one"), saved("two")
    spoil(one, float("nan"))
    found = run("compose", "add", one, two, "--out", tmp_path / "o")
    assert found.exit_code == 2 and "holds values that are not finite" in found.stderr
    assert not (tmp_path / "o").exists()
    assert run("inspect", one).exit_code == 0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_verify_finds_infinity_as_well(saved, value) -> None:
    one = saved("one")
    spoil(one, value)
    assert {check.name: check.verdict for check in verify_adapter(one)}["values"] == FAILED


@pytest.mark.parametrize("weights", ["1,nan", "1,inf"])
def test_weights_that_are_not_finite(saved, tmp_path, weights) -> None:
    words = ("add", saved("one"), saved("two"), "--weights", weights, "--out", tmp_path / "o")
    found = run("compose", *words)
    assert found.exit_code == 2 and "give finite numbers" in found.stderr


def test_zeros_are_no_conflict() -> None:
    one = Change((1, 4), torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0, 1, 2]), 3)
    two = Change((1, 4), torch.tensor([-1.0, 1.0, 5.0]), torch.tensor([0, 1, 2]), 3)
    assert align((1, 4), [one, two]).present.all()
    assert compare_change("x", one, two)["opposite"] == 2
    assert compare_change("x", one, None)["opposite"] == 0


def test_dare_follows_its_seed(saved, tmp_path) -> None:
    folders = [saved("one"), saved("two")]
    for name, seed in (("a", 0), ("b", 1), ("again", 1)):
        compose(folders, Request("dare", (1.0, 1.0), 0.5, seed), out=tmp_path / name)
    a, b, again = ((tmp_path / n / TENSORS).read_bytes() for n in ("a", "b", "again"))
    assert b == again and a != b
