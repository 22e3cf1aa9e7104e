from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def batch() -> dict[str, Any]:
    """Token ids that are their own labels."""
    import torch

    ids = torch.randint(48, (3, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def spiel(llama) -> Callable[..., Any]:
    """Wrap a base (a tiny Llama by default) with SpIEL."""

    def build(base: Any = None, **fields: Any) -> Any:
        from peft import get_peft_model

        from sft import SpielConfig

        if not {"num_weights", "match_lora_rank"} & set(fields):
            fields.setdefault("density", 0.1)
        base = llama() if base is None else base
        return get_peft_model(base, SpielConfig(task_type="CAUSAL_LM", **fields))

    return build


@pytest.fixture
def randomize() -> Callable[..., None]:
    """Give every trainable parameter random values, as training would."""

    def fill(model: Any, scale: float = 0.05, seed: int = 2) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(scale * noise)

    return fill


@pytest.fixture
def base_weights() -> Callable[[Any], dict[str, Any]]:
    """Copy all weights but the adapters' by their names in the bare model, read as they lie."""

    def read(model: Any) -> dict[str, Any]:
        own = f".{getattr(model.base_model, 'prefix', 'delta_')}"
        return {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): p.detach().clone()
            for name, p in model.named_parameters()
            if own not in name
        }

    return read


@pytest.fixture
def same() -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    """Tell whether two dictionaries of tensors are equal bit for bit."""

    def compare(one: dict[str, Any], other: dict[str, Any]) -> bool:
        import torch

        return one.keys() == other.keys() and all(
            one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
        )

    return compare


@pytest.fixture
def make_layer() -> Callable[..., Any]:
    """Build a DeltaLayer over a small stock layer, with k random positions and deltas."""

    def build(kind: str, *, bias: bool = True, k: int = 9, dtype: Any = None, **more: Any) -> Any:
        import torch
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from sft.adapters.deltas.layer import DeltaLayer

        torch.manual_seed(7)
        if kind == "linear":
            base: Any = nn.Linear(6, 5, bias=bias)
        elif kind == "conv1d":
            base = Conv1D(5, 6)
            nn.init.normal_(base.bias)
        else:
            base = nn.Embedding(6, 5, padding_idx=3)
        layer = DeltaLayer(base.requires_grad_(False).to(dtype or torch.float32), **more)
        indices = torch.randperm(30)[:k].sort().values
        layer.add_adapter("default", indices, torch.randn(k) / 10)
        return layer

    return build
