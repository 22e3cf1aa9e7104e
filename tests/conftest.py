"""Tiny models, and a gauge of the largest tensor an operation produces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # raised once a process, by PEFT, in whichever test comes first
    message = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    config.addinivalue_line("filterwarnings", message)


@pytest.fixture
def llama() -> Callable[..., Any]:
    """Build a Llama of two layers; the same weights every time."""

    def build(**changes: Any) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        fields = {
            "vocab_size": 48,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        return LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()

    return build


@pytest.fixture
def gpt2() -> Callable[..., Any]:
    """Build a GPT-2 of two layers, whose linear layers are Conv1D."""

    def build(**changes: Any) -> Any:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        fields = {
            "vocab_size": 48,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": False,
        }
        return GPT2LMHeadModel(GPT2Config(**(fields | changes))).eval()

    return build


@pytest.fixture
def largest_tensor() -> Callable[[Callable[[], Any]], int]:
    """Run a function; return the bytes of the largest tensor that any operation in it returned."""

    def measure(run: Callable[[], Any]) -> int:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        class Gauge(TorchDispatchMode):
            largest = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for leaf in tree_leaves(out):
                    if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                        self.largest = max(self.largest, leaf.numel() * leaf.element_size())
                return out

        with Gauge() as gauge:
            run()
        return gauge.largest

    return measure
