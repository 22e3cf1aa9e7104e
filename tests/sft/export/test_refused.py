"""What an export refuses in one line, leaving every file as it was."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.adapters.methods.spiel import SpielConfig

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def adapter(byte_base, adapter_on):
    return adapter_on(byte_base, SpielConfig(density=0.1, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("form", ["gguf", "merged", "patch", "lora", "shira", "adapter"])
def test_the_base_is_never_replaced(refused, adapter, byte_base, form) -> None:
    before = sorted(byte_base.iterdir())
    line = refused("export", adapter, "--to", form, "--out", byte_base, "--overwrite")
    assert f"would replace {byte_base}, which is read" in line
    assert sorted(byte_base.iterdir()) == before


@pytest.mark.parametrize("size", ["lots", "-5", "0", "5 GB"])
def test_a_size_of_shards(refused, adapter, tmp_path, size) -> None:
    words = ("--to", "merged", "--out", tmp_path / "out", "--max-shard-size", size)
    assert f"--max-shard-size: got {size!r}; expected" in refused("export", adapter, *words)


def test_a_place_that_cannot_be_written(refused, adapter) -> None:
    line = refused("export", adapter, "--to", "merged", "--out", "/proc/none/out")
    assert "/proc/none/out: cannot be written (" in line


@pytest.mark.parametrize("text", ["{oops", "[1]"])
def test_settings_that_do_not_read(refused, adapter, tmp_path, text) -> None:
    (adapter / "adapter_config.json").write_text(text)
    line = refused("export", adapter, "--to", "merged", "--out", tmp_path / "out")
    assert "adapter_config.json: " in line


def test_a_delta_that_is_not_finite_has_no_factors(refused, adapter, tmp_path) -> None:
    tensors = load_file(adapter / TENSORS)
    name = next(name for name in tensors if name.endswith("delta_values"))
    tensors[name][0] = torch.nan
    save_file(tensors, adapter / TENSORS, metadata={"format": "pt"})
    line = refused("export", adapter, "--to", "lora", "--out", tmp_path / "out")
    assert "holds values that are not finite" in line and not (tmp_path / "out").exists()
