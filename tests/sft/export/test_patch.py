"""A patch is the changed weights and nothing else; base and patch are the trained model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sft
from sft.errors import UserError
from sft.export.adapter import export_adapter
from sft.export.forms import Request, export
from sft.export.patch import Patch, apply_patches, read_patches, write_patch
from sft.export.patched import export_patch
from sft.export.source import find_source

TASK = {"task_type": "CAUSAL_LM"}
FILE = "model.safetensors"


def spiel(density=0.05):
    return sft.SpielConfig(density=density, **TASK)


def quiet(_: str) -> None:
    pass


@pytest.fixture
def patch(byte_base, adapter_on, tmp_path):
    adapter = adapter_on(byte_base, spiel())
    counts, difference = export_patch(find_source(adapter), tmp_path / "patch", say=quiet)
    assert difference == 0
    return tmp_path / "patch", counts, adapter


def test_base_and_patch_are_the_merged_model_bit_for_bit(byte_base, patch, tmp_path) -> None:
    folder, counts, adapter = patch
    export_adapter(adapter, base=None, to=tmp_path / "merged", say=quiet)
    merged = load_file(tmp_path / "merged" / FILE)
    base = load_file(byte_base / FILE)
    moved = {name: int((merged[name] != base[name]).sum()) for name in base}
    found = {each.name: each for each in read_patches(folder)}
    assert found.keys() == {name for name, count in moved.items() if count}
    assert counts.changed == sum(moved.values()) and 0.03 < counts.changed / counts.total < 0.06
    assert counts.bytes == (folder / "patch.safetensors").stat().st_size
    for name, each in found.items():
        assert each.shape == tuple(base[name].shape) and each.dtype == torch.float32
        assert each.indices is not None and each.indices.dtype == torch.int32
        assert bool((each.indices.diff() > 0).all())
        assert torch.equal(merged[name].flatten()[each.indices.long()], each.values)
    apply_patches(base, folder)
    assert all(torch.equal(base[name], merged[name]) for name in merged)
    model = AutoModelForCausalLM.from_pretrained(byte_base)
    apply_patches(dict(model.named_parameters()), folder)
    state = model.state_dict()
    assert all(torch.equal(state[name], merged[name]) for name in merged)


def test_the_fields_are_those_that_vllm_takes(patch) -> None:
    """vllm.model_executor.model_loader.checkpoint_weight_patch.CheckpointWeightPatch."""
    assert Patch._fields == ("name", "shape", "dtype", "values", "indices")
    for each in read_patches(patch[0]):
        assert each.dtype.is_floating_point and each.values.dim() == each.indices.dim() == 1
        assert len(each.values) == len(each.indices.unique())


def test_a_tensor_that_changed_everywhere_is_written_whole(byte_base, adapter_on, tmp_path):
    adapter = adapter_on(byte_base, LoraConfig(target_modules=["q_proj"], **TASK))
    _, difference = export_patch(find_source(adapter), tmp_path / "patch", say=quiet)
    assert difference == 0
    found = read_patches(tmp_path / "patch")
    assert len(found) == 2 and all(each.indices is None for each in found)
    assert all(each.values.shape == (math.prod(each.shape),) for each in found)


def test_other_weights_are_refused_and_left_alone(byte_base, patch) -> None:
    base = load_file(byte_base / FILE)
    *_, last = read_patches(patch[0])
    base[last.name].view(-1)[int(last.indices[0])] += 1
    before = {name: tensor.clone() for name, tensor in base.items()}
    with pytest.raises(UserError, match=rf"was made for other weights of {last.name}; give the "):
        apply_patches(base, patch[0])
    assert all(torch.equal(base[name], before[name]) for name in base)
    del base[last.name]
    with pytest.raises(UserError, match=r"where it was made, here it is none; give the base of"):
        apply_patches(base, patch[0])
    wide = {name: tensor.double() for name, tensor in before.items()}
    with pytest.raises(UserError, match=r"here it is torch\.float64"):
        apply_patches(wide, patch[0])


def test_a_damaged_patch_is_refused(patch) -> None:
    folder = patch[0]
    good = load_file(folder / "patch.safetensors")
    name = read_patches(folder)[0].name
    where, what = good[f"{name}.indices"], good[f"{name}.values"]
    for part, tensor in (
        ("indices", where.flip(0)),
        ("indices", torch.cat([where[:-1], torch.tensor([10**6], dtype=torch.int32)])),
        ("indices", where.float()),
        ("values", what[:-1]),
        ("values", torch.full_like(what, math.nan)),
        ("values", what.double()),
    ):
        save_file(good | {f"{name}.{part}": tensor}, folder / "patch.safetensors")
        with pytest.raises(UserError, match=rf"is damaged \({name}: .*\); write it again"):
            read_patches(folder)
    save_file(good, folder / "patch.safetensors")
    (folder / "patch.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        read_patches(folder)
    content = json.loads((folder / "patch.json").read_text())
    for changed in ([], {"format": 1}, content | {"format": 9}):
        (folder / "patch.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="is no whole patch"):
            read_patches(folder)


def test_a_patch_is_itself_exported(byte_base, patch, tmp_path) -> None:
    folder, counts, adapter = patch
    export_adapter(adapter, base=None, to=tmp_path / "merged", say=quiet)
    line = export(folder, "merged", Request(to=tmp_path / "again"), quiet)
    assert line.endswith("a stock model; reloaded, max |logit difference| 0")
    again, merged = (load_file(tmp_path / n / FILE) for n in ("again", "merged"))
    assert all(torch.equal(again[name], merged[name]) for name in merged)
    request = Request(to=tmp_path / "patch2", base=str(byte_base))
    export(tmp_path / "merged", "patch", request, quiet)
    mine, theirs = (load_file(f / "patch.safetensors") for f in (folder, tmp_path / "patch2"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine) and counts.changed


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_has_no_place_in_the_base_is_refused(byte_base, adapter_on, tmp_path) -> None:
    config = sft.SpielConfig(density=0.1, modules_to_save=["lm_head"], **TASK)
    adapter = adapter_on(byte_base, config)
    with pytest.raises(UserError, match=r"lm_head\.weight of the trained model has no such place"):
        export_patch(find_source(adapter), tmp_path / "patch", say=quiet)
    assert not (tmp_path / "patch").exists()


def test_a_number_that_is_none_is_refused(tmp_path) -> None:
    class Broken:
        def changed(self):
            return ["w"]

        def before(self, name):
            return torch.zeros(3)

        def read(self, name):
            return torch.tensor([0.0, math.nan, 0.0])

    with pytest.raises(UserError, match="w holds NaN; the training went wrong"):
        write_patch(Broken(), tmp_path, "base")
