"""Models adapted by the methods, and what is read off them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def s2ft(llama) -> Callable[..., Any]:
    """Wrap a base (a tiny Llama with two query heads of one key-value head) with S2FT."""

    def build(base: Any = None, **fields: Any) -> Any:
        from peft import get_peft_model

        from sft import S2FTConfig

        if not {"ratio", "num_weights", "match_lora_rank", "density"} & set(fields):
            fields["ratio"] = 0.1
        base = llama(num_key_value_heads=1) if base is None else base
        return get_peft_model(base, S2FTConfig(task_type="CAUSAL_LM", **fields))

    return build


@pytest.fixture
def slices() -> Callable[..., dict[str, set[int]]]:
    """Read the trained features of an S2FT adapter by module."""

    def read(model: Any, adapter: str = "default") -> dict[str, set[int]]:
        return {
            name: set(layer.s2ft_indices[adapter].tolist())
            for name, layer in model.base_model.adapted_layers(adapter).items()
        }

    return read


@pytest.fixture
def resident_logits() -> Callable[[Any, dict[str, Any]], Any]:
    """Run a batch with resident weights."""

    def run(model: Any, batch: dict[str, Any]) -> Any:
        import torch

        import sft

        with sft.resident(model), torch.no_grad():
            return model(**batch).logits

    return run
