"""Facts of an update over several processes: each evaluates its own directions or its own data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

from sft.kernels.noise import noise
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.engine import ALONE, Engine, Processes
from sft.optim.zeroth_order.inplace import InplaceMode
from sft.optim.zeroth_order.keys import step_key
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.trained import Trained

SEED, DIM, UPDATES = 3, 50, 4


class Meeting:
    """Lets threads exchange numbers, as processes do."""

    def __init__(self, count: int) -> None:
        self.count, self._barrier = count, Barrier(count)
        self._rows: list[list[float]] = [[]] * count

    def processes(self, rank: int) -> Processes:
        def exchange(numbers: Sequence[float]) -> list[list[float]]:
            self._rows[rank] = list(numbers)
            self._barrier.wait(10)
            rows = list(self._rows)
            self._barrier.wait(10)
            return rows

        return Processes(rank, self.count, exchange)


def slopes(rank: int) -> Tensor:
    """The loss of a rank's data is slopes . w, whose projected gradient is exact at any eps."""
    return torch.randn(DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def train(
    config: ZerothOrderConfig, processes: Processes, slope: Callable[[], Tensor]
) -> tuple[Tensor, list[tuple[float, ...]]]:
    weight = nn.Parameter(torch.ones(DIM, dtype=torch.float64), requires_grad=False)
    trained = [Trained("w", weight, 7)]
    own = processes.count if config.parallel == "queries" else 1
    optimizer = ZerothOrderOptimizer(
        [{"params": [weight], "lr": 1e-3}], trained, config, SEED, queries=config.queries * own
    )
    engine = Engine(config, optimizer, InplaceMode(trained, config.noise), processes)
    for _ in range(UPDATES):
        engine.evaluate(lambda: float(slope() @ weight), last=True)
        optimizer.step()
    return weight.detach(), [row.gradients or () for row in optimizer.log.rows]


def together(config: ZerothOrderConfig) -> list[tuple[Tensor, list[tuple[float, ...]]]]:
    meeting = Meeting(2)

    def one(rank: int) -> tuple[Tensor, list[tuple[float, ...]]]:
        return train(config, meeting.processes(rank), lambda: slopes(rank))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def config(**changes: object) -> ZerothOrderConfig:
    return ZerothOrderConfig(eps=1e-2, mode="inplace", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("queries", [1, 3])
def test_processes_take_directions_of_their_own(queries: int) -> None:
    """Direction q of process r has the key of number r * queries + q, and the loss of r's data."""
    (first, rows), (second, others) = together(config(parallel="queries", queries=queries))
    assert torch.equal(first, second) and rows == others
    for update, row in enumerate(rows):
        assert len(row) == 2 * queries
        for number, g in enumerate(row):
            z = noise(step_key(SEED, update, number), 7, DIM, kind="rademacher").double()
            assert g == pytest.approx(float(slopes(number // queries) @ z), rel=1e-6)


def test_z12_processes_that_share_directions_average_their_losses() -> None:
    (first, rows), (second, others) = together(config())
    assert torch.equal(first, second) and rows == others
    alone, expected = train(config(), ALONE, lambda: (slopes(0) + slopes(1)) / 2)
    for row, one in zip(rows, expected, strict=True):
        assert row == pytest.approx(one, rel=1e-6)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-9)


def test_a_loss_that_is_not_finite_on_one_process_skips_the_update_on_all() -> None:
    meeting = Meeting(2)

    def one(rank: int) -> tuple[Tensor, list[tuple[float, ...]]]:
        return train(config(), meeting.processes(rank), lambda: slopes(rank) / (1 - rank))

    with ThreadPoolExecutor(2) as pool:
        (first, rows), (second, others) = pool.map(one, range(2))
    assert rows == others == [()] * UPDATES
    # restored from where the losses were taken, up to rounding
    torch.testing.assert_close(first, torch.ones(DIM, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(first, second)


def test_an_update_that_was_broken_off_leaves_nothing_behind() -> None:
    weight = nn.Parameter(torch.ones(DIM, dtype=torch.float64), requires_grad=False)
    trained = [Trained("w", weight, 7)]
    settings = config()
    optimizer = ZerothOrderOptimizer([{"params": [weight], "lr": 1e-3}], trained, settings, SEED)
    mode = InplaceMode(trained, settings.noise)
    engine = Engine(settings, optimizer, mode)
    engine.evaluate(lambda: float(slopes(1) @ weight), last=False)  # a micro-batch that counts
    sides = iter([1.0])
    with pytest.raises(StopIteration):
        engine.evaluate(lambda: next(sides), last=True)
    assert mode.standing == ()
    torch.testing.assert_close(weight.data, torch.ones_like(weight))
    engine.evaluate(lambda: float(slopes(0) @ weight), last=True)
    optimizer.step()
    (_, [expected, *_]) = train(settings, ALONE, lambda: slopes(0))
    (found,) = optimizer.log.rows
    assert found.gradients == pytest.approx(expected)


def test_closing_takes_back_the_perturbation_of_an_update_that_was_never_made() -> None:
    """Bit for bit, as neither w nor eps of this test is rounded."""
    weight = nn.Parameter(torch.arange(-3.0, 4.0), requires_grad=False)
    original = weight.detach().clone()
    trained = [Trained("w", weight, 7)]
    settings = ZerothOrderConfig(eps=2**-7, mode="inplace")
    optimizer = ZerothOrderOptimizer([{"params": [weight], "lr": 1e-3}], trained, settings, SEED)
    engine = Engine(settings, optimizer, InplaceMode(trained, settings.noise))
    engine.evaluate(lambda: float(weight.sum()), last=True)
    assert not torch.equal(weight, original)  # the optimizer would have restored them in its step
    engine.close()
    assert torch.equal(weight.data, original)
    assert optimizer.moved == ()
