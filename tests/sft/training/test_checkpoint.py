"""A checkpoint that was cut short is never taken for a whole one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from sft.checkpoint import check_whole, last_whole_checkpoint, load_state, save_state


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint as the Trainer and we leave it, a second adapter included."""
    checkpoint = tmp_path / "run" / "checkpoint-7"
    (checkpoint / "other").mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"12345")
    (checkpoint / "other" / "adapter_model.safetensors").write_bytes(b"123")
    save_state(checkpoint, {"a": torch.arange(3), "b": torch.ones(2)[:1]}, {"step": 7})
    return checkpoint


def refused(folder):
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: ") as caught:
        check_whole(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_was_saved_comes_back(folder):
    tensors, notes = load_state(folder)
    assert torch.equal(tensors["a"], torch.arange(3))
    assert torch.equal(tensors["b"], torch.ones(1))
    assert notes["step"] == 7


def test_tensors_may_share_storage(folder):
    base = torch.arange(4.0)
    save_state(folder, {"whole": base, "part": base[:2], "again": base}, {})
    tensors, _ = load_state(folder)
    assert torch.equal(tensors["part"], base[:2])


def test_without_its_mark_it_is_refused(folder):
    (folder / "sft_state.json").unlink()
    assert "cut short" in refused(folder)


def test_a_mark_that_is_half_written_is_refused(folder):
    mark = folder / "sft_state.json"
    mark.write_text(mark.read_text()[:-20])
    assert "sft_state.json" in refused(folder)


def test_another_format_is_refused(folder):
    mark = folder / "sft_state.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"format": 99}))
    assert "has format 99, allowed is 1" in refused(folder)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "sft_state.safetensors", "other/adapter_model.safetensors"]
)
def test_a_truncated_or_missing_file_is_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{name} has {path.stat().st_size} bytes" in refused(folder)
    path.unlink()
    assert f"{name} has None bytes" in refused(folder)


def test_what_is_no_folder_is_refused(folder):
    assert "is not a folder" in refused(folder / "optimizer.pt")


def test_the_newest_whole_one_is_found(folder, tmp_path):
    run = tmp_path / "run"
    assert last_whole_checkpoint(run) == folder
    shutil.copytree(folder, run / "checkpoint-10")
    shutil.copytree(folder, run / "checkpoint-9")
    assert last_whole_checkpoint(run).name == "checkpoint-10", "by number, not by name"
    (run / "checkpoint-10" / "optimizer.pt").write_bytes(b"1")
    (run / "checkpoint-11").mkdir()
    (run / "checkpoint-other").mkdir()
    assert last_whole_checkpoint(run).name == "checkpoint-9"
    assert last_whole_checkpoint(tmp_path) is None


def test_a_killed_save_is_refused_and_the_one_before_is_taken(lab, assert_equal):
    whole = lab.run("whole", save_strategy="steps", save_steps=3)
    newest, damaged = (lab.folder / "whole" / f"checkpoint-{step}" for step in (12, 9))
    (newest / "sft_state.json").unlink()
    state = damaged / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-100])
    for folder in (newest, damaged):
        with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*checkpoint"):
            lab.run("whole", str(folder))
    resumed = lab.run("whole", True)
    assert resumed.replaced == {10: whole.replaced[10]}
    assert resumed.trainer.state.global_step == 12
    assert len(resumed.losses) == 12, "the log of the six updates before is kept"
    assert_equal(lab.deltas(whole.model), lab.deltas(resumed.model))


def test_nothing_whole_is_one_clear_line(lab):
    lab.run("whole", save_strategy="steps", save_steps=12)
    (lab.folder / "whole" / "checkpoint-12" / "sft_state.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        lab.run("whole", True)


def test_the_mark_says_what_it_is_of(lab):
    from sft import SparseCallback

    callback = SparseCallback(notes={"recipe": {"seed": 3}})
    lab.run("run", save_strategy="steps", save_steps=5, trainer={"callbacks": [callback]})
    notes = json.loads((lab.folder / "run" / "checkpoint-5" / "sft_state.json").read_text())
    assert notes["step"] == 5
    assert notes["recipe"] == {"seed": 3}
    assert len(notes["support_sha256"]) == len(notes["base_fingerprint"]) == 64
    assert set(notes["versions"]) >= {"torch", "transformers", "peft", "sparse-sft"}
    assert "adapter_model.safetensors" in notes["files"]
