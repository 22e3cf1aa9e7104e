"""A tiny model, packed by bitsandbytes, and its dense twin: what the packed weights stand for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Packed:
    """Loads the model in several forms, adapts and trains it; equal arguments, equal bits."""

    folder: Path
    out: Path

    def packed(self, quantization: dict[str, Any], **spec: Any) -> Any:
        from sft.models import load_model
        from sft.recipe.schema import ModelSpec

        given = {"name": str(self.folder), "quantization": quantization} | spec
        return load_model(ModelSpec.model_validate(given))

    def reference(self) -> Any:
        from sft.models import load_model
        from sft.recipe.schema import ModelSpec

        return load_model(ModelSpec(name=str(self.folder)))

    def twin(self, quantization: dict[str, Any]) -> Any:
        """Return a dense model that holds the dequantised weights."""
        from sft.adapters.quantized import dequantised, packed_modules

        model = self.reference()
        for name, module in packed_modules(self.packed(quantization)):
            model.get_submodule(name).weight.data.copy_(dequantised(module))
        return model

    def adapt(self, model: Any, config: Any, *, moved: float = 0.0) -> Any:
        """Put an adapter on; `moved` gives it random values of that size, as if trained."""
        import torch
        from peft import get_peft_model

        torch.manual_seed(1)
        adapted = get_peft_model(model, copy.deepcopy(config))
        noise = torch.Generator().manual_seed(2)
        for parameter in adapted.parameters():
            if moved and parameter.requires_grad:
                parameter.data = moved * torch.randn(parameter.shape, generator=noise)
        return adapted

    def train(self, adapted: Any, *, resume: str | None = None, cls: Any = None, **settings: Any):
        import torch
        from transformers import PrinterCallback, TrainingArguments

        from sft import SparseTrainer

        torch.manual_seed(1)
        defaults = {
            "use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
            "save_strategy": "no",
        }  # fmt: skip
        out = str(self.out / settings.pop("out", "run"))
        arguments = TrainingArguments(out, **defaults | settings)
        trainer = (cls or SparseTrainer)(model=adapted, args=arguments, train_dataset=self.rows())
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def rows(self) -> Any:
        import torch
        from datasets import Dataset

        first = torch.randint(1, 64, (32, 1), generator=torch.Generator().manual_seed(1))
        ids = ((first + 3 * torch.arange(12)) % 63 + 1).tolist()
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    @staticmethod
    def batch() -> dict[str, Any]:
        import torch

        ids = torch.arange(1, 25).view(2, 12)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @staticmethod
    def base_bytes(model: Any) -> dict[str, bytes]:
        """What the packed modules hold, their scales included."""
        from sft.adapters.quantized import packed_modules, packing

        found = {}
        for name, module in packed_modules(model):
            weight = module.weight
            if packing(module) == "int8":
                scales = weight.SCB if weight.SCB is not None else module.state.SCB
            else:
                scales = weight.quant_state.absmax
            content = weight.data.numpy().tobytes() + scales.float().numpy().tobytes()
            found[name.replace(".base_layer", "")] = content
        return found

    @staticmethod
    def state(adapted: Any) -> dict[str, Any]:
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        return {name: tensor.clone() for name, tensor in found.items()}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("packed")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def lab(tiny_folder, tmp_path):
    import torch

    pytest.importorskip("bitsandbytes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Packed(tiny_folder, tmp_path)
    torch.set_num_threads(threads)
