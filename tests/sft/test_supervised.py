"""The lean loss on a CPU is TRL's, and steps aside where positions move."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from sft.arguments import build_arguments, machine_defaults
from sft.supervised import SparseSFTTrainer
from sft.trainable import build_method

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


@pytest.mark.parametrize("method", ["full", "lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.filterwarnings("ignore:.*virtual tokens:UserWarning")
def test_the_first_loss_is_that_of_trl(method, tiny_model, tiny_tokenizer, rows, tmp_path) -> None:
    fields = {} if method in ("full", "lora") else {"num_virtual_tokens": 3}

    def first_loss(cls):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        trainable = build_method({"name": method, **fields})
        settings = machine_defaults() | {
            "output_dir": str(tmp_path / cls.__name__),
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
        }
        args = build_arguments(settings, seed=0)
        trainer = cls(
            model=trainable.attach(model, None),
            args=args,
            train_dataset=Dataset.from_json(str(rows)),
            processing_class=tiny_tokenizer,
        )
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert first_loss(SparseSFTTrainer) == pytest.approx(first_loss(SFTTrainer), abs=2e-4)
