"""The lean loss on a CPU is TRL's, and steps aside where positions move."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from sft.recipe.arguments import machine_defaults
from sft.run.trainable import kind_of
from sft.trainers.supervised import SparseSFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


@pytest.mark.parametrize("method", ["full", "lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.filterwarnings("ignore:.*virtual tokens:UserWarning")
def test_the_first_loss_is_that_of_trl(method, tiny_model, tiny_tokenizer, rows, tmp_path) -> None:
    fields = {} if method in ("full", "lora") else {"num_virtual_tokens": 3}

    def first_loss(cls):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        trainable = kind_of(method)(method, fields, "CAUSAL_LM")
        settings = machine_defaults(SFTConfig) | {
            "output_dir": str(tmp_path / cls.__name__),
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
        }
        args = SFTConfig(**settings, seed=0)
        trainer = cls(
            model=trainable.attach(model, None),
            args=args,
            train_dataset=Dataset.from_json(str(rows)),
            processing_class=tiny_tokenizer,
        )
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert first_loss(SparseSFTTrainer) == pytest.approx(first_loss(SFTTrainer), abs=2e-4)


class Shifted(LlamaForCausalLM):
    """Does something to its logits that no configuration names."""

    def forward(self, *args, labels=None, logits_to_keep=0, **kwargs):
        found = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        found.logits = found.logits + 0.1 * torch.arange(self.config.vocab_size)
        if labels is not None:
            found.loss = self.loss_function(
                found.logits, labels, self.config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )  # fmt: skip
        return found


def test_logits_that_are_not_known_are_left_to_the_model(
    tiny_model, tiny_tokenizer, rows, tmp_path
) -> None:
    settings = machine_defaults(SFTConfig) | {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
    }
    trainer = SparseSFTTrainer(
        model=Shifted.from_pretrained(tiny_model),
        args=SFTConfig(**settings, seed=0),
        train_dataset=Dataset.from_json(str(rows)),
        processing_class=tiny_tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    found = [float(trainer.compute_loss(trainer.model, dict(batch)).detach()) for _ in range(2)]
    logits = trainer.model(**batch).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    assert found == pytest.approx(2 * [wanted.item()], abs=1e-5)
