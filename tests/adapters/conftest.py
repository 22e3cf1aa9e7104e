from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
