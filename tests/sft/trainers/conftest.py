"""Tiny Llamas with adapters, and stock TRL arguments over them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

PROMPTS = ["one two three ->", "two three four ->", "three four five ->", "four five six ->"] * 2
REPLIES = {"chosen": [" seven"] * 8, "rejected": [" six"] * 8}


@pytest.fixture(scope="session")
def llama() -> Any:
    """Return what builds the same tiny Llama each time."""
    return build_llama


@pytest.fixture(scope="session")
def method_config() -> Any:
    """Return what builds configurations by the names of methods."""
    return build_config


def build_llama(**settings: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | ids | settings))


def build_config(method: str, **settings: Any) -> Any:
    """Return a configuration of a method that has something to do on tiny layers."""
    from peft import LoraConfig

    from sft.adapters.registry import config_class

    if method == "lora":
        return LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    owner = config_class(method)
    wanted = {"density": 0.1, "reselect_every": 2, "window": 1, "task_type": "CAUSAL_LM"}
    known = {field.name for field in fields(owner)}
    return owner(**{k: v for k, v in wanted.items() if k in known} | settings)


def settings(out: Any, **more: Any) -> dict[str, Any]:
    """Return what a stock script says, for a CPU."""
    return {
        "output_dir": str(out), "use_cpu": True, "bf16": False, "max_steps": 4, "logging_steps": 1,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False,
    } | more  # fmt: skip


@pytest.fixture
def preferences():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": PROMPTS} | REPLIES)


@pytest.fixture
def train(tmp_path, preferences, tiny_tokenizer):
    """Build one of TRL's trainers, or of ours, over a model."""

    def build(cls: Any, config_class: Any, model: Any, *, out: str = "run", **more: Any) -> Any:
        from datasets import Dataset
        from transformers import PrinterCallback

        given = {key: more.pop(key) for key in ("peft_config", "ref_model") if key in more}
        rows = preferences
        if "SFT" in cls.__name__:
            rows = Dataset.from_dict({"prompt": PROMPTS, "completion": REPLIES["chosen"]})
        if "GRPO" in cls.__name__:
            rows = Dataset.from_dict({"prompt": PROMPTS})
            given["reward_funcs"] = reward
            more = {"num_generations": 2, "max_completion_length": 4} | more
        trainer = cls(
            model=model,
            args=config_class(**settings(tmp_path / out, **more)),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            **given,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return build


def reward(completions: list[str], **_: Any) -> list[float]:
    """Prefer one word to all others."""
    return [float("seven" in completion) + len(completion) / 100 for completion in completions]
