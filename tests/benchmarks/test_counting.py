"""What the benchmarks count: seconds by part, bytes held, kept and alive at once."""

from __future__ import annotations

import pytest
import torch
from allocations import peak_and_largest_bytes, peak_bytes, storages
from census import held_bytes
from clock import Clock
from rounds import interleave
from saved import saved_bytes
from torch import nn


def test_a_part_inside_another_takes_its_time_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 13.0, 20.0])
    monkeypatch.setattr("time.process_time", lambda: next(now))
    clock = Clock()
    with clock.part("backward"), clock.part("selection"):
        pass
    found = clock.stop()
    assert (found["backward"], found["selection"], found["forward"]) == (17.0, 3.0, 0.0)


def test_rounds_are_interleaved_and_the_first_is_thrown_away() -> None:
    order: list[str] = []

    def step(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleave({name: lambda name=name: step(name) for name in "ab"}, 2)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert len(interleave({"a": lambda: step("a")}, 2, warm_up=False)["a"]) == 2


class Holder(nn.Module):
    """Holds one tensor of each kind that the census knows."""

    __module__ = "sft.probe"

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(10), requires_grad=False)
        self.trained = nn.Parameter(torch.zeros(4))
        self.view = self.frozen[2:5]
        self.hidden = {"indices": [torch.zeros(3, dtype=torch.int32)]}
        self.originals = (torch.zeros(7, dtype=torch.bfloat16),)


def test_bytes_are_told_apart_and_no_view_counts_twice() -> None:
    model = Holder()
    optimizer = torch.optim.AdamW([model.trained])
    model.trained.grad = torch.ones(4)
    optimizer.step()
    step_counter = 4
    assert held_bytes(model, optimizer) == {
        "frozen": 40,
        "trained": 16,
        "indices": 12,
        "originals": 14,
        "optimizer": 32 + step_counter,
        "gradients": 16,
    }


class Square(nn.Module):
    """x w x, which keeps x w and x for backward, and lets another graph go."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = (self.weight.exp() * 2).detach()
        assert norm.requires_grad is False
        return x * self.weight * x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square = Square()

    def forward(self, x: torch.Tensor) -> object:
        class Output:
            loss = self.square(x).exp().sum()

        return Output


def test_kept_for_backward_is_what_the_graph_still_keeps() -> None:
    model, x = Model(), torch.ones(6)
    found = saved_bytes(model, {"x": x}, model.parameters())
    # the x of x w, its product needs no more; exp keeps its result; the graph of the norm is gone
    assert found == {"Square": 24, "Model": 24}
    assert saved_bytes(model, {"x": x}, [*model.parameters(), x]) == {"Model": 24}


def test_a_peak_counts_what_lives_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.zeros(100_000).add(1.0)

    assert 800_000 <= peak_bytes(run) < 900_000
    assert 800_000 <= peak_bytes(run, warm_up=False) < 900_000
    assert peak_and_largest_bytes(run) == (800_000, 400_000)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_a_sparse_tensor_is_its_parts() -> None:
    dense = torch.eye(5)
    sizes = [sorted(s.nbytes() for s in storages(t)) for t in (dense.to_sparse(), dense)]
    assert sizes == [[20, 80], [100]]
    assert [s.nbytes() for s in storages(dense.to_sparse_csr())] == [48, 80, 20]
