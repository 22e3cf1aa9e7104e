"""What a Trainer with a sharded model saves, and where it goes: no shards are needed to see it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft import OffloadConfig, SparseTrainer, SpielConfig
from sft.engines.checkpoints import load_optimizer
from sft.engines.optimizer_state import OptimizerState, names_of
from sft.optim.adamw import SparseAdamW


@pytest.fixture
def trainer(llama, tmp_path):
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import TrainingArguments

    ids = torch.randint(1, 48, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()

    def build(offload=None, **settings):
        arguments = {"use_cpu": True, "max_steps": 1, "report_to": [], "disable_tqdm": True}
        settings = {"save_strategy": "no", "logging_strategy": "no", **settings}
        config = SpielConfig(density=0.05, growth="none", task_type="CAUSAL_LM")
        return SparseTrainer(
            model=get_peft_model(llama(), config),
            args=TrainingArguments(str(tmp_path / "run"), **arguments | settings),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
            offload=offload,
        )

    return build


def test_what_a_user_saves_is_pushed_and_a_checkpoint_is_not(trainer, tmp_path, monkeypatch):
    built, pushed = trainer(), []
    monkeypatch.setattr(built, "push_to_hub", lambda **how: pushed.append(how))
    built.is_fsdp_enabled = True
    built.save_model(str(tmp_path / "quiet"))
    assert not pushed
    built.args.push_to_hub, built.args.hub_revision = True, "mine"
    built.save_model(str(tmp_path / "checkpoint"), _internal_call=True)
    assert not pushed
    built.save_model(str(tmp_path / "saved"))
    assert pushed == [{"commit_message": "Model save", "revision": "mine"}]
    files = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("quiet", "saved")
    ]
    assert files[0].keys() == files[1].keys() and files[0]


STATE = OffloadConfig(optimizer="cpu")


def test_the_checkpoint_of_another_optimizer_is_one_clear_line(trainer, tmp_path):
    built = trainer(STATE, save_strategy="steps", save_steps=1)
    built.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    other = torch.optim.SGD([p for p in built.model.parameters() if p.requires_grad], lr=1.0)
    tensors = OptimizerState(other).gather(names_of(built.model))
    save_file(tensors, checkpoint / "sft_optimizer.safetensors")
    again = trainer(STATE, max_steps=2)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: its optimizer") as said:
        again.train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(said.value)


def test_a_checkpoint_without_an_optimizer_is_one_clear_line(trainer, tmp_path):
    from sft.engines.plain import PlainEngine

    built = trainer()
    optimizer = SparseAdamW([p for p in built.model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(ValueError, match=r"holds no sft_optimizer.safetensors and no optimizer.pt"):
        load_optimizer(built, PlainEngine(optimizer), Path(tmp_path))
