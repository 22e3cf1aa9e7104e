from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import sft
from sft.errors import UserError
from sft.export.adapter import export_adapter
from sft.export.merged import export_merged, logits_of, trained_logits, verify_merged
from sft.whole import written_whole

# PEFT asks transformers by a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
BATCH = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.ones(1, 4).long()}


@pytest.fixture
def base(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def adapted(base):
    """Give an adapter whose deltas are random, as if trained."""
    config = sft.SpielConfig(density=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seed = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=seed))
    return model


def test_the_reloaded_model_is_the_trained_one_bit_for_bit(adapted, base, tokenizer, tmp_path):
    before = logits_of(base, [BATCH])
    expected = trained_logits(adapted, [BATCH])
    merged = export_merged(adapted, tokenizer, tmp_path / "merged")
    assert verify_merged(tmp_path / "merged", [BATCH], expected) == 0
    assert torch.equal(logits_of(merged, [BATCH])[0], expected[0])
    assert not torch.equal(before[0], expected[0])
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names


def test_a_wrong_model_fails_and_takes_no_name(adapted, tokenizer, tmp_path):
    wrong = [torch.zeros(1, 4, 12)]
    with pytest.raises(UserError, match=r"max \|logit difference\|"):
        export_merged(
            adapted, tokenizer, tmp_path / "merged",
            check=lambda path: verify_merged(path, [BATCH], wrong),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_taken_for_equal(base, tokenizer, tmp_path):
    export_merged(base, tokenizer, tmp_path / "m")
    with pytest.raises(UserError):
        verify_merged(tmp_path / "m", [BATCH], [torch.full((1, 4, 12), torch.nan)])


@pytest.fixture
def saved(adapted, tokenizer, tmp_path):
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_adapter_is_exported_and_checked(saved, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    to = tmp_path / "out"
    assert export_adapter(saved, base=str(tiny_model), to=to) == 0
    again = AutoModelForCausalLM.from_pretrained(to)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), saved)
    assert torch.equal(logits_of(again, [BATCH])[0], trained_logits(model, [BATCH])[0])


def test_an_export_may_round_to_half_precision(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    to = tmp_path / "out"
    assert export_adapter(saved, base=None, to=to, dtype="bfloat16") == 0
    assert AutoModelForCausalLM.from_pretrained(to, dtype="auto").dtype == torch.bfloat16


def test_a_filled_folder_is_kept_unless_told(saved, tmp_path):
    to = tmp_path / "out"
    to.mkdir()
    (to / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty; pass --overwrite"):
        export_adapter(saved, base=None, to=to)
    assert (to / "mine.txt").read_text() == "keep"
    assert export_adapter(saved, base=None, to=to, overwrite=True) == 0
    assert not (to / "mine.txt").exists()


def test_what_is_not_an_adapter_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        export_adapter(tmp_path, base=None, to=tmp_path / "out")
    with pytest.raises(UserError, match="--dtype: got 'int8'; expected one of auto"):
        export_adapter(saved, base=None, to=tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_refused_in_one_line(saved, tmp_path):
    weights = saved / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: damaged") as caught:
        export_adapter(saved, base=None, to=tmp_path / "out")
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        export_adapter(saved, base=None, to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused_in_one_line(saved, tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="does not fit") as caught:
        export_adapter(saved, base=str(tmp_path / "other"), to=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "f"
    with pytest.raises(RuntimeError), written_whole(folder) as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with written_whole(folder) as temporary:
        (temporary / "a").write_text("1")
    with written_whole(folder) as temporary:
        (temporary / "b").write_text("2")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_folder_is_there_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    """Whatever step fails, what was there is there again."""
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("1")
    real, moves = os.replace, []

    def failing(source, target):
        moves.append(Path(source).name)
        if len(moves) == 2:
            raise OSError(errno.EIO, "input/output error")
        real(source, target)

    monkeypatch.setattr("sft.whole.os.replace", failing)
    with pytest.raises(OSError, match="input"), written_whole(folder) as temporary:
        (temporary / "b").write_text("2")
    assert moves[0] == "f" and [path.name for path in tmp_path.iterdir()] == ["f"]
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_full_disk_is_one_line(tmp_path):
    refused = pytest.raises(UserError, match=r"cannot be written \(.+\); free some space")
    with refused, written_whole(tmp_path / "f"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
