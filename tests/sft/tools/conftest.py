"""Adapters with random values on disk, of every method, over tiny models on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

METHODS: dict[str, dict[str, Any]] = {
    "spiel": {"density": 0.1},
    "s2ft": {"density": 0.1, "selection": "random"},
    "sora": {"r": 4},
    "sltrain": {"r": 4, "density": 0.05},
    "lora": {"r": 4, "target_modules": "all-linear"},
}


@pytest.fixture
def base(tmp_path, llama) -> Path:
    """A Llama of two layers on disk."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(tmp_path, base) -> Callable[..., Path]:
    """Save an adapter of random values over the Llama, or over another model on disk."""

    def save(name: str, method: str = "spiel", over: Path | None = None, **fields: Any) -> Path:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        from sft.run.trainable import kind_of

        model = AutoModelForCausalLM.from_pretrained(over or base)
        config = kind_of(method).config_class(method)
        settings = {**METHODS[method], "task_type": "CAUSAL_LM", **fields}
        adapted = get_peft_model(model, config(**settings))
        randomise(adapted, seed=sum(map(ord, name)))
        if method == "sora":  # ranks that closed
            with torch.no_grad():
                for layer in adapted.base_model.adapted_layers("default").values():
                    layer.sora_gate["default"][1] = 0
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def randomise(model: Any, seed: int) -> None:
    """Give what is trained other values."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def loaded() -> Callable[..., Any]:
    """Load an adapter over its real base, by stock PEFT."""

    def load(folder: Path) -> Any:
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder)

    return load


@pytest.fixture
def deltas(loaded) -> Callable[[Path], dict[str, Any]]:
    """Return the dense delta of every module of an adapter, over its real base."""

    def read(folder: Path) -> dict[str, Any]:
        model = loaded(folder).base_model.model
        return {
            name: module.get_delta_weight("default").detach()
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight") and module.active_adapters
        }

    return read
