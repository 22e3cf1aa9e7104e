"""`sft export`: what it takes, what it refuses, and what a run does at its end."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sft
from sft.cli import app
from sft.errors import UserError
from sft.export.converted import export_copy
from sft.export.source import find_source

_PACKED_ANEW = ("export.quantized=requantize",)
SPIEL = {"task_type": "CAUSAL_LM"}


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_all_forms_of_a_run(refused, recipe_file, tmp_path) -> None:
    """The tokenizer of the tiny model has no GGUF form; else all is written, and compared."""
    also = "export.also=[patch,shira,lora]"
    bounds = ("export.max_error=0.9", "export.rank=2")
    result = run("train", recipe_file, also, *bounds, "export.dtype=bfloat16", "--plain")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run"
    for form in ("patch", "shira", "lora", "merged", "adapter"):
        assert "spiel" in (folder / form / "README.md").read_text(), form
    assert "a patch of" in result.output and "applied to the base, max |logit difference| 0" in (
        " ".join(result.output.split())
    )
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert merged.dtype == torch.bfloat16
    card = (folder / "merged/README.md").read_text()
    assert "| token_error_rate |" in card and "## What it forgot" in card
    again = run("export", folder, "--to", "merged", "--out", tmp_path / "again")
    assert again.exit_code == 0 and "merged weight by weight into 1 file" in again.output
    mine = load_file(tmp_path / "again/model.safetensors")
    theirs = load_file(folder / "merged/model.safetensors")
    assert all(torch.equal(mine[name].bfloat16(), theirs[name]) for name in mine)
    assert "WordLevel" in refused("export", folder, "--to", "gguf", "--out", tmp_path / "gguf")


def test_a_run_of_the_model_itself_is_a_patch_of_its_base(refused, recipe_file, tmp_path) -> None:
    full = ("method={name: full, modules: [up_proj]}", "export.also=[patch]")
    result = run("train", recipe_file, *full, "forgetting=null", "--plain")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "run/patch/patch.json").read_text())
    assert {name.split(".")[-2] for name in content["tensors"]} == {"up_proj"}
    line = refused("export", tmp_path / "run", "--to", "lora", "--out", tmp_path / "x")
    assert "merged holds a model, allowed is an adapter; use --to merged, or --to patch" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method={name: full}", "export.also=[lora]"], "got lora, but full leaves no adapter"),
        (["export.also=[onnx]"], "export.also"),
        (["export.max_shard_size=5 lb"], "max_shard_size: got '5 lb'; expected one such as 5GB"),
        (["export.private=true"], "export.private: got true without push_to_hub"),
        (["model.quantization={bits: nf4}", "export.also=[patch]"], "got patch over a packed base"),
        (
            ["model.quantization={bits: nf4}", *_PACKED_ANEW, "export.dtype=float16"],
            "export.dtype: got float16, but the merged model is packed",
        ),
        (
            ["method={name: full}", "export.merged=false", "export.push_to_hub=me/it"],
            "export.push_to_hub: got one, but nothing is written",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_before_training(
    refused, recipe_file, settings, message
) -> None:
    assert message in refused("validate", recipe_file, *settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx"], "--to: got 'onnx'; expected merged, adapter, lora, shira, "),
        (["--to", "lora", "--out", "x", "--format", "lora"], "--format: is --to now, and the"),
        (["--to", "merged"], "--out: got none; name the folder to write"),
        (["--to", "merged", "--out", "x", "--uniform-rank"], "--uniform-rank: is of --to lora"),
        (["--to", "patch", "--out", "x", "--max-error", "0.1"], "--max-error: is of --to lora"),
        (["--to", "lora", "--out", "x", "--gguf-type", "f16"], "--gguf-type: is of --to gguf"),
        (["--to", "patch", "--out", "x", "--dtype", "float16"], "--dtype: is of --to merged or ad"),
        (["--to", "merged", "--out", "x", "--private"], "--private: is of what is pushed"),
        (["--to", "merged", "--out", "x"], "holds no adapter (adapter_config.json), delta, patch"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(refused, tmp_path, options, message) -> None:
    assert message in refused("export", tmp_path, *options)


def test_a_filled_folder_is_kept_and_a_source_never_replaced(
    refused, byte_base, adapter_on, tmp_path
):
    adapter = adapter_on(byte_base, sft.SpielConfig(density=0.1, **SPIEL))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    line = refused("export", adapter, "--to", "patch", "--out", out)
    assert f"--out: {out}: is not empty; pass --overwrite" in line
    for form in ("merged", "patch", "shira", "adapter"):
        for source in (adapter, byte_base):
            line = refused("export", adapter, "--to", form, "--out", source, "--overwrite")
            assert "which is read; give another folder" in line, (form, source)
    assert run("export", adapter, "--to", "patch", "--out", out, "--overwrite").exit_code == 0
    assert not (out / "mine").exists()


def test_an_adapter_is_packed_anew_and_may_be_cast(byte_base, adapter_on, tmp_path) -> None:
    config = sft.SpielConfig(density=0.1, **SPIEL)
    adapter = adapter_on(byte_base, config)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(byte_base), adapter)
    layers = model.base_model.adapted_layers("default")
    file = adapter / "adapter_model.safetensors"
    packed = load_file(file)
    plain = {
        f"base_model.model.{name}.delta_indices": layer.delta_indices["default"]
        for name, layer in layers.items()
    }
    assert plain.keys() <= packed.keys()
    save_file(packed | plain, file, metadata={"format": "pt"})
    before, after, difference = export_copy(adapter, base=None, to=tmp_path / "copy")
    assert difference == 0 and after < 0.75 * before
    found = load_file(tmp_path / "copy/adapter_model.safetensors")
    assert found.keys() == packed.keys()
    assert all(torch.equal(found[name].view(packed[name].shape), packed[name]) for name in packed)
    _, half, difference = export_copy(adapter, base=None, to=tmp_path / "half", dtype="bfloat16")
    assert half < 0.75 * after and 0 < difference < 0.1
    assert (tmp_path / "half/adapter_config.json").read_text() == (
        adapter / "adapter_config.json"
    ).read_text()


def test_a_source_is_told_by_what_it_holds(byte_base, adapter_on, tmp_path) -> None:
    adapter = adapter_on(byte_base, sft.SpielConfig(density=0.1, **SPIEL))
    assert (find_source(adapter).kind, find_source(adapter).folder) == ("adapter", adapter)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"name": "a/b"}}))
    found = find_source(tmp_path)
    assert (found.kind, found.folder, found.run) == ("adapter", adapter, tmp_path)
    assert find_source(byte_base).kind == "model"
    assert find_source(byte_base).base == "a/b"  # as the run around it says
    with pytest.raises(UserError, match="no such folder; give that of an adapter or of a run"):
        find_source(tmp_path / "nothing")
