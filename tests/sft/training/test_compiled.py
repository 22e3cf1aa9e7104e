"""Trained through a compiled graph: the losses of eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

import sft

pytestmark = pytest.mark.filterwarnings("ignore")  # the tracer warns of what it does itself

DATA = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(8, 12) % 47]


@pytest.mark.parametrize("gradient", ["backward", "forward passes"])
def test_updates_reach_the_compiled_forward(llama, tmp_path, gradient) -> None:
    """Values that only the next eager forward would write are never read by a compiled one."""
    options: dict[str, Any] = {}
    if gradient == "forward passes":
        options["zeroth_order"] = sft.ZerothOrderConfig(mode="inplace", eps=1e-2)

    def losses(compiled: bool) -> list[float]:
        torch._dynamo.reset()
        config = sft.SpielConfig(density=0.05, growth="none", target_modules="all-linear")
        model = get_peft_model(llama(num_hidden_layers=1), config)
        args = TrainingArguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,
        )
        trainer = sft.SparseTrainer(model=model, args=args, train_dataset=DATA, **options)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses(compiled=False)
    assert len(set(expected)) == 3
    assert losses(compiled=True) == expected
