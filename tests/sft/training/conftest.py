"""A laboratory for training runs: a tiny Llama, tiny data, and what a run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Run:
    """A finished run."""

    model: Any
    trainer: Any
    losses: list[float]

    @property
    def replaced(self) -> dict[int, int]:
        return sparse_callback(self.trainer).replaced

    @property
    def optimizer(self) -> Any:
        return self.trainer.optimizer.optimizer


def sparse_callback(trainer):
    from sft import SparseCallback

    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, SparseCallback)]
    assert len(found) == 1
    return found[0]


class Lab:
    """Builds models and trainers; every call with the same arguments gives the same bits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self, cls: str = "LlamaForCausalLM", **settings: Any) -> Any:
        import torch
        import transformers

        torch.manual_seed(0)
        settings = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        } | settings
        return getattr(transformers, cls)(transformers.LlamaConfig(**settings))

    def adapted(self, base: Any = None, **method: Any) -> Any:
        from peft import get_peft_model

        from sft import SpielConfig

        settings = {
            "density": 0.05,
            "task_type": "CAUSAL_LM",
            "reselect_every": 4,
            "window": 2,
        }
        return get_peft_model(base or self.base(), SpielConfig(**settings | method))

    def dataset(self, count: int = 32, labels: int | None = None) -> Any:
        """Rows in which each token but the first follows from the one before it."""
        import torch
        from datasets import Dataset

        first = torch.randint(1, 64, (count, 1), generator=torch.Generator().manual_seed(1))
        ids = (first + 3 * torch.arange(12)) % 63 + 1
        kept = ids if labels is None else ids[:, 0] % labels
        return Dataset.from_dict({"input_ids": ids.tolist(), "labels": kept.tolist()})

    def arguments(self, out: str, **settings: Any) -> Any:
        from transformers import TrainingArguments

        defaults = {
            "use_cpu": True,
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        return TrainingArguments(str(self.folder / out), **defaults | settings)

    def trainer(
        self,
        out: str = "run",
        *,
        model: Any = None,
        base: Any = None,
        cls: Any = None,
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        """Build a trainer; settings are fields of SpielConfig or of TrainingArguments."""
        from transformers import PrinterCallback

        from sft import SparseTrainer, SpielConfig

        ours = {field.name for field in fields(SpielConfig)}
        method = {key: settings.pop(key) for key in list(settings) if key in ours}
        given = {"train_dataset": self.dataset()} | (trainer or {})
        if "model_init" not in given:
            given["model"] = self.adapted(base, **method) if model is None else model
        built = (cls or SparseTrainer)(args=self.arguments(out, **settings), **given)
        built.remove_callback(PrinterCallback)
        return built

    def run(self, out: str = "run", resume: Any = None, **settings: Any) -> Run:
        built = self.trainer(out, **settings)
        built.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
        return Run(built.model, built, losses)

    def checkpoint(self, out: str, step: int) -> str:
        return str(self.folder / out / f"checkpoint-{step}")

    # -- what is compared --------------------------------------------------------------------

    @staticmethod
    def deltas(model: Any) -> dict[str, Any]:
        return {n: t.clone() for n, t in model.state_dict().items() if "delta_" in n}

    @staticmethod
    def weights(model: Any) -> dict[str, Any]:
        """The base weights by their name in the bare model."""
        inner = getattr(getattr(model, "base_model", None), "model", model)
        found = {}
        for name, parameter in inner.named_parameters():
            if "delta_" not in name:
                found[name.replace(".base_layer", "")] = parameter.detach().clone()
        return found

    @staticmethod
    def optimizer_state(optimizer: Any) -> dict[str, Any]:
        """Every tensor and number of the optimizer, by group, parameter and key."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        return {
            f"{i}.{j}.{key}": value
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
            for key, value in optimizer.state[parameter].items()
        }


@pytest.fixture
def lab(tmp_path):
    import torch

    # tensors this small are slower on several threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Lab(tmp_path)
    torch.set_num_threads(threads)


@pytest.fixture
def assert_equal():
    """Compare two dictionaries of tensors or numbers, dtype and bit."""
    import torch

    def compare(a, b):
        assert a.keys() == b.keys()
        assert a
        for name, value in a.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == b[name].dtype, name
                assert torch.equal(value, b[name]), name
            else:
                assert value == b[name], name

    return compare
