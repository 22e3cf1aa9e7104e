"""`training.deepspeed`: defaults that run, and errors that name the key."""

from __future__ import annotations

import os
import time

import pytest
import yaml

from sft.errors import UserError
from sft.recipe.deepspeed import STALE, prepare_processes, resolve_deepspeed
from sft.recipe.source import Source, read

pytest.importorskip("deepspeed", reason="deepspeed is not installed")


@pytest.fixture
def source(tmp_path) -> Source:
    path = tmp_path / "recipe.yaml"
    path.write_text("training:\n  deepspeed:\n    zero_optimization: {stage: 2}\n")
    return read(path)


def test_what_is_not_given_is_filled_in(source) -> None:
    found = resolve_deepspeed(
        {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, source
    )
    assert found["zero_optimization"] == {"stage": 2}
    assert found["bf16"] == {"enabled": True}
    assert found["train_micro_batch_size_per_gpu"] == "auto"
    assert found["zero_allow_untested_optimizer"] is True
    assert found["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("given", "wanted"), [({}, True), ({"torch_adam": False}, False)], ids=["silent", "asked"]
)
def test_adam_of_the_configuration_is_torchs_unless_asked(source, given, wanted) -> None:
    optimizer = {"type": "AdamW", "params": given}
    config = {"zero_optimization": {"stage": 1}, "optimizer": optimizer}
    assert resolve_deepspeed(config, source)["optimizer"]["params"]["torch_adam"] is wanted
    assert optimizer == {"type": "AdamW", "params": given}


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_path_is_read(source, tmp_path, suffix) -> None:
    path = tmp_path / f"ds.{suffix}"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    assert resolve_deepspeed(str(path), source)["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "zero_optimization.stage is missing"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage got 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage got True"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean 'overlap_comm'"),
        ("nowhere.json", "is no file"),
    ],
    ids=["empty", "no such stage", "a boolean", "misspelt", "no file"],
)
def test_errors_name_the_key_and_the_line(source, given, message) -> None:
    with pytest.raises(UserError, match=message) as raised:
        resolve_deepspeed(given, source)
    assert "training.deepspeed" in str(raised.value)
    assert "recipe.yaml:2" in str(raised.value)


@pytest.fixture
def bare(monkeypatch, tmp_path):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "set to be restored")
        monkeypatch.delenv(key)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def test_a_process_without_a_launcher_is_alone(bare) -> None:
    prepare_processes()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert int(os.environ["MASTER_PORT"]) > 0


def test_a_launchers_word_stands(bare, monkeypatch) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    prepare_processes()
    assert {key: os.environ[key] for key in given} == given


def test_the_lock_of_a_killed_build_is_named(bare) -> None:
    lock = bare / "py3_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    prepare_processes()  # somebody may be building
    os.utime(lock, (time.time() - 2 * STALE,) * 2)
    with pytest.raises(UserError, match="remove it"):
        prepare_processes()


@pytest.mark.parametrize("name", ["spiel_zero2", "s2ft_zero3_offload"])
def test_a_recipe_resolves_without_starting_deepspeed(name) -> None:
    from sft.recipe.load import load_recipe

    recipe = load_recipe(f"recipes/{name}.yaml")
    assert recipe.training["deepspeed"]["zero_allow_untested_optimizer"] is True
    assert yaml.safe_dump(recipe.training["deepspeed"])


@pytest.mark.parametrize(
    ("method", "stage", "whole"), [("full", 3, True), ("full", 2, None), ("spiel", 3, None)]
)
def test_full_training_under_zero3_saves_the_model_whole(recipe_file, method, stage, whole) -> None:
    from sft.recipe.load import load_recipe

    zero = f"training.deepspeed={{zero_optimization: {{stage: {stage}}}}}"
    found = load_recipe(recipe_file, [f"method={{name: {method}}}", zero])
    section = found.training["deepspeed"]["zero_optimization"]
    assert section.get("stage3_gather_16bit_weights_on_model_save") is whole
