"""The commands that read adapters: output, data, exit codes."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from sft.cli import app
from sft.recipe.shipped import SHIPPED


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_inspect_prints_layers_and_types(run, saved) -> None:
    found = run("inspect", saved("one"))
    assert found.exit_code == 0, found.output
    assert "spiel on " in found.stdout and "14 modules reach 10 % of their" in found.stdout
    lines = [line.split() for line in found.stdout.splitlines() if line.strip()]
    assert {"q_proj", "down_proj", "0", "1"} <= {line[0] for line in lines}
    assert "model.layers.1.mlp.up_proj" in run("inspect", saved("two"), "--modules").stdout


def test_inspect_compares_several(run, saved) -> None:
    found = run("inspect", saved("one"), saved("two"), saved("three", seed=2))
    assert "1 and 2" in found.stdout and "2 and 3" in found.stdout
    assert "1.000" in next(line for line in found.stdout.splitlines() if "1 and 2" in line)


def test_data_alone(run, saved) -> None:
    one, two = saved("one"), saved("two", seed=3)
    inspected = json.loads(run("inspect", one, two, "--json").stdout)
    assert [a["method"] for a in inspected["adapters"]] == ["spiel", "spiel"]
    assert 0 < inspected["overlaps"][0]["jaccard"] < 0.5
    compared = json.loads(run("diff", one, two, "--json").stdout)
    assert compared["jaccard"] == inspected["overlaps"][0]["jaccard"]
    assert json.loads(run("verify", one, "--json").stdout)["ok"] is True


def test_diff_in_every_direction(run, saved, loaded, base, tmp_path) -> None:
    one, merged = saved("one"), tmp_path / "merged"
    loaded(one).merge_and_unload().save_pretrained(merged)
    assert "jaccard 1.000" in run("diff", one, one).stdout
    for order in ((merged, one), (one, merged)):
        assert "jaccard 1.000" in run("diff", *order).stdout
    found = run("diff", merged, base)
    assert found.stdout.startswith(f"{merged}\n  model on {base}\n")
    assert run("diff", merged, merged, "--base", base).stdout.count("jaccard 1.000") == 1


def test_compose_says_what_came_of_it(run, saved, tmp_path) -> None:
    one, two = saved("one"), saved("two")
    found = run("compose", "add", one, two, "--out", tmp_path / "out", "--weights", "1,0.5")
    assert found.exit_code == 0, found.output
    assert "1 and 2" in found.stdout and "read back, equal" in found.stdout
    dense = run("compose", "scale", saved("three", "lora"), "--out", tmp_path / "dense")
    assert "the result is dense" in dense.stdout


def test_verify_exits_with_one(run, saved) -> None:
    folder = saved("one")
    assert run("verify", folder).exit_code == 0
    found = run("verify", folder, "--support", "beef")
    assert found.exit_code == 1 and "support   FAILED" in found.stdout
    nothing = run("verify", folder, "--support", "")
    assert nothing.exit_code == 2 and nothing.stderr.startswith("sft: --support: got nothing")


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "nowhere"),
        ("diff", "nowhere", "nowhere"),
        ("compose", "add", "nowhere", "nowhere", "--out", "out"),
        ("compose", "add", "nowhere", "nowhere", "--out", "out", "--weights", "1;2"),
        ("schema", "--out", "no/such/folder/schema.json"),
        ("plot", "nowhere", "--out", "out.png"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_not_there_is_one_line(run, monkeypatch, tmp_path, arguments) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(*arguments)
    assert found.exit_code == 2 and len(found.stderr.splitlines()) == 1, found.output
    assert found.stderr.startswith("sft: ")


@pytest.mark.parametrize("place", ["A", "B"])
def test_diff_names_what_is_not_there_once(run, monkeypatch, tmp_path, base, place) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"A": ("./nowhere", base), "B": (base, "./nowhere")}[place]
    found = run("diff", *given)
    assert found.exit_code == 2
    assert found.stderr == f"sft: {place}: ./nowhere: no such folder\n"


def test_schema_is_written_with_its_hint(run, tmp_path) -> None:
    found = run("schema", "--out", tmp_path / "recipe.schema.json")
    assert "# yaml-language-server: $schema=recipe.schema.json" in found.stdout
    written = json.loads((tmp_path / "recipe.schema.json").read_text())
    assert json.loads(run("schema").stdout) == written


def test_recipes_are_listed_by_the_bare_command(run) -> None:
    found = run("recipes")
    assert found.stdout == run("recipes", "list").stdout
    lines = {line.split()[0]: line for line in found.stdout.splitlines()}
    assert lines.keys() - {"name"} == {path.stem for path in SHIPPED.glob("*.yaml")}
    assert re.match(r"quickstart +sft +spiel +.*Teach .*", lines["quickstart"])
    assert re.match(r"mezo +sft +full, zeroth order +.*Teach .*", lines["mezo"])
    data = {row["name"]: row for row in json.loads(run("recipes", "list", "--json").stdout)}
    assert data.keys() == lines.keys() - {"name"}
    assert (data["quickstart"]["task"], data["quickstart"]["method"]) == ("sft", "spiel")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("sft train qu", ["quickstart"]),
        ("sft train my", ["my.yaml"]),
        ("sft recipes show s2ft_n", ["s2ft_nf4"]),
        ("sft insp", ["inspect"]),
    ],
)
def test_a_shell_completes_names(monkeypatch, tmp_path, words, wanted) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").touch()
    env = {"_SFT_COMPLETE": "complete_bash", "COMP_WORDS": words}
    env["COMP_CWORD"] = str(len(words.split()) - 1)
    found = CliRunner().invoke(app, [], env=env, prog_name="sft")
    assert found.stdout.split() == wanted
