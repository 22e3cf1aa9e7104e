"""What adapter and optimizer hold for each trained weight, against the table in docs/spiel.md."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sft.adapters.deltas.layer import DeltaLayer
from sft.adapters.deltas.window import Window
from sft.kernels.sm3 import Positions
from sft.optim.adamw import SparseAdamW
from sft.optim.sm3 import SM3

ROWS, COLS, K = 512, 768, 20_000
PAGE = Path(__file__).resolve().parents[2] / "docs" / "spiel.md"


def documented(row: str) -> tuple[int, int]:
    """The bytes that the page gives for a row of its table: (AdamW, SM3)."""
    (cells,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \|$", PAGE.read_text("utf-8"), re.M)
    adamw, sm3 = cells.split(" | ")
    return int(adamw), int(sm3)


def held() -> int:
    """Bytes of all tensors alive."""
    gc.collect()
    # type(): isinstance() asks lazy stand-ins for their class, which warn
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    # tests of compiled layers leave fakes, which hold nothing
    real = [t for t in tensors if type(t) is not FakeTensor and not t.is_meta]
    strided = [t.untyped_storage() for t in real if t.layout == torch.strided]
    storages = {s.data_ptr(): s.nbytes() for s in strided}
    return sum(storages.values())


def adapted(dtype: torch.dtype = torch.float32) -> DeltaLayer:
    layer = DeltaLayer(nn.Linear(COLS, ROWS, bias=False).requires_grad_(False).to(dtype))
    layer.add_adapter("default", torch.randperm(ROWS * COLS)[:K].sort().values, torch.zeros(K))
    return layer


def one_update(layer: DeltaLayer, optimizer: torch.optim.Optimizer) -> None:
    layer(torch.randn(4, COLS)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "sm3"])
def test_fact38_bytes_of_an_entry(name: str) -> None:
    # tables that a process makes once, such as the bias corrections by age
    warm = adapted()
    one_update(warm, SparseAdamW([warm.delta_values["default"]]))
    del warm
    before = held()
    layer = adapted()
    weight = layer.get_base_layer().weight
    values = layer.delta_values["default"]
    if name == "adamw":
        optimizer = SparseAdamW([values])
    else:
        pattern = layer.site("default").pattern
        where = Positions(pattern.rows(), pattern.columns.long(), pattern.shape)
        optimizer = SM3([values], positions=lambda _: where)
        del pattern
    one_update(layer, optimizer)
    if name == "sm3":
        where = None
    after = held() - before - weight.numel() * 4
    which = ("adamw", "sm3").index(name)
    rows = ["position and its column (int32)", "value, gradient (float32)", "age, two moments"]
    entry = sum(documented(row)[which] for row in rows)
    statistics = 4 * (ROWS + COLS) if name == "sm3" else 0
    assert after <= 1.01 * (entry * K + statistics) + 4 * (ROWS + 1) + 1024
    assert after >= 0.99 * entry * K


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fact38_residency_keeps_the_originals_only(dtype: torch.dtype) -> None:
    layer = adapted(dtype)
    layer(torch.randn(4, COLS, dtype=dtype)).sum().backward()
    before = held()
    layer.enter_resident()
    layer(torch.randn(4, COLS, dtype=dtype)).sum().backward()
    assert 0 <= held() - before - K * dtype.itemsize <= 1024


def test_fact38_bytes_of_a_window() -> None:
    layer = adapted()
    layer(torch.randn(4, COLS)).sum().backward()
    before = held()
    window = Window(layer.site("default"), include_active=False, whole_update=False)
    for _ in range(2):
        layer(torch.randn(4, COLS)).sum().backward()
        window.close_update(1.0)
    entry, _ = documented("during a window: candidate and its column, two sums")
    assert 0.99 * entry * K <= held() - before <= 1.01 * entry * K + 4 * (ROWS + 1) + 1024
