"""Tiny models, a gauge of the largest tensor an operation produces, and ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


class Seat:
    """One of several ranks that are threads: `sft.adapters.ranks.Ranks` without processes."""

    def __init__(self, table: Any, rank: int) -> None:
        self._table, self.rank, self.count = table, rank, table.count

    def mean(self, tensor: Any) -> Any:
        import torch

        laid = self._table.exchange(self.rank, tensor.detach().clone())
        return torch.stack(laid).sum(0) / self.count

    def gather(self, numbers: Any) -> list[list[float]]:
        return [list(row) for row in self._table.exchange(self.rank, list(numbers))]

    def check_alike(self, what: str, checksum: int) -> None:
        found = self._table.exchange(self.rank, checksum)
        if len(set(found)) > 1:
            raise RuntimeError(f"{what}: differs between the ranks")


class Table:
    """Where all ranks lay something down, then take up what each has laid."""

    def __init__(self, count: int) -> None:
        self.count, self._laid = count, [None] * count
        self._meet = threading.Barrier(count, timeout=5)

    def exchange(self, rank: int, what: Any) -> list[Any]:
        self._laid[rank] = what
        self._meet.wait()
        found = list(self._laid)
        self._meet.wait()
        return found

    def leave(self) -> None:
        """Let nobody wait for one that has failed."""
        self._meet.abort()


@pytest.fixture
def together() -> Callable[..., list[Any]]:
    """Run a function of one rank in several at once; a collective that one leaves out fails."""

    def run(part: Callable[[Any], Any], count: int = 2) -> list[Any]:
        table = Table(count)

        def seated(rank: int) -> Any:
            try:
                return part(Seat(table, rank))
            except BaseException:
                table.leave()
                raise

        with ThreadPoolExecutor(count) as pool:
            futures = [pool.submit(seated, rank) for rank in range(count)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    return run
