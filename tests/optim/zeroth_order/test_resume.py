"""A run goes on bit for bit from its state, and is repeated bit for bit from its log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sft.kernels.displace import displace
from sft.kernels.mask import Magnitude
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.estimate import projected_gradients
from sft.optim.zeroth_order.header import config_of, mask_of
from sft.optim.zeroth_order.keys import parameter_ids
from sft.optim.zeroth_order.log import ZerothOrderLog
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.trained import Trained, trained_set

SHAPES = {"layers.0.weight": (90, 70), "layers.0.bias": (70,), "head.weight": (70, 5)}
UPDATES = 8
SETTINGS = {
    "plain": {"lr_moves": True},
    "bf16": {"dtype": torch.bfloat16, "queries": 2, "log_dtype": "float16"},
    "sign": {"update": "sign", "noise": "gaussian_table"},
    "magnitude": {"sparsity": 0.75, "lr_moves": True},
    "random": {"sparsity": 0.5, "mask": "random", "queries": 3},
    "momentum": {"update": "momentum", "sparsity": 0.5},
    "adam": {"update": "adam", "dtype": torch.bfloat16, "noise": "gaussian"},
}


class Toy:
    """Weights that are pulled to where noise of another seed lies, by a schedule if asked."""

    def __init__(self, *, lr_moves: bool = False, dtype: Any = torch.float32, **changes: Any):
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            name: nn.Parameter(torch.randn(shape, generator=generator).mul(0.02).to(dtype), False)
            for name, shape in SHAPES.items()
        }
        self.config = ZerothOrderConfig(eps=1e-2, **changes)
        self.lr_moves = lr_moves

    def optimizer(self, seed: int = 5) -> ZerothOrderOptimizer:
        trained = trained_set(self.parameters.items(), self.config, seed)
        groups = [
            {"params": [t.parameter for t in trained if t.name.endswith(end)], "lr": 1e-3} | decay
            for end, decay in (("weight", {"weight_decay": 0.1}), ("bias", {}))
        ]
        return ZerothOrderOptimizer(groups, trained, self.config, seed)

    def schedule(self, optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda i: 1 / (1 + i) if self.lr_moves else 1.0)

    def loss(self, tensors: Sequence[Tensor]) -> float:
        return sum(float((t.double() - 0.05).square().sum()) for t in tensors)

    def run(self, optimizer: ZerothOrderOptimizer, schedule: LambdaLR, updates: int) -> None:
        kind = self.config.noise
        for _ in range(updates):
            sides: tuple[list[float], list[float]] = ([], [])
            for key in optimizer.keys(self.config.queries):
                for side, c in zip(sides, (-1e-2, 1e-2), strict=True):
                    moved = displace(
                        [t.parameter for t in optimizer.trained],
                        [t.id for t in optimizer.trained],
                        [(key, c)],
                        kind=kind,
                        masks=[t.mask for t in optimizer.trained],
                    )
                    side.append(self.loss(moved))
            if optimizer.updates == 2:
                sides[0][0] = float("nan")
            optimizer.propose(projected_gradients(self.config, *sides, None))
            optimizer.step()
            schedule.step()

    def bits(self) -> list[Tensor]:
        return [p.detach().clone().view(torch.uint8) for p in self.parameters.values()]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def whole_run(settings: dict[str, Any]) -> tuple[Toy, ZerothOrderOptimizer]:
    toy = Toy(**settings)
    optimizer = toy.optimizer()
    toy.run(optimizer, toy.schedule(optimizer), UPDATES)
    return toy, optimizer


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("cut", [1, 4])
def test_z9_a_resumed_run_is_the_uninterrupted_one(
    settings: dict[str, Any], cut: int, tmp_path: Path
) -> None:
    expected, uninterrupted = whole_run(settings)
    first = Toy(**settings)
    optimizer = first.optimizer()
    schedule = first.schedule(optimizer)
    first.run(optimizer, schedule, cut)
    saved = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(saved, tmp_path / "state.pt")

    second = Toy(**settings)
    for name, parameter in second.parameters.items():
        parameter.data.copy_(first.parameters[name])
    resumed = second.optimizer()  # of weights that have moved: thresholds would be other ones
    going_on = second.schedule(resumed)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["optimizer"])
    going_on.load_state_dict(state["schedule"])
    assert (resumed.updates, resumed.skipped) == (optimizer.updates, optimizer.skipped)
    second.run(resumed, going_on, UPDATES - cut)
    assert equal(second.bits(), expected.bits())
    assert list(resumed.log.rows) == list(uninterrupted.log.rows)
    assert resumed.skipped == 1
    for parameter, other in zip(
        second.parameters.values(), expected.parameters.values(), strict=True
    ):
        mine, theirs = resumed.state.get(parameter, {}), uninterrupted.state.get(other, {})
        assert mine.keys() == theirs.keys()
        assert all(t.dtype == torch.float32 and torch.equal(t, theirs[n]) for n, t in mine.items())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_z9_the_log_repeats_the_run_without_a_loss(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    expected, optimizer = whole_run(settings)
    optimizer.log.save(tmp_path / "log.safetensors")
    log = ZerothOrderLog.load(tmp_path / "log.safetensors")
    fresh = Toy(**settings)
    ids = parameter_ids(row[0] for row in log.header["trained"])
    trained = [
        Trained(row[0], fresh.parameters[row[0]], ids[row[0]], mask_of(row))
        for row in reversed(log.header["trained"])  # in no order
    ]
    groups: list[dict[str, Any]] = [
        {**group, "params": [], "lr": 0.0} for group in log.header["groups"]
    ]
    for row in log.header["trained"]:
        groups[row[3]]["params"].append(fresh.parameters[row[0]])
    replaying = ZerothOrderOptimizer(groups, trained, config_of(log.header), log.header["seed"])
    for row in log.rows:
        for group, rate in zip(replaying.param_groups, row.rates, strict=True):
            group["lr"] = rate
        replaying.propose(row.gradients)
        replaying.step()
    assert equal(fresh.bits(), expected.bits())
    assert not equal(fresh.bits(), Toy(**settings).bits())


def test_the_state_survives_accelerates_wrapper_and_its_own_load(tmp_path: Path) -> None:
    """The wrapper loads the state as it is made; later it saves and loads through itself."""
    settings = SETTINGS["magnitude"]
    expected, _ = whole_run(settings)
    toy = Toy(**settings)
    wrapped = Accelerator(cpu=True).prepare_optimizer(toy.optimizer())
    schedule = toy.schedule(wrapped.optimizer)
    toy.run(wrapped.optimizer, schedule, 3)
    torch.save(wrapped.state_dict(), tmp_path / "state.pt")
    toy.run(wrapped.optimizer, schedule, 2)
    second = Toy(**settings)
    other = Accelerator(cpu=True).prepare_optimizer(second.optimizer())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.optimizer.updates == 3
    toy.run(wrapped.optimizer, schedule, UPDATES - 5)
    assert equal(toy.bits(), expected.bits())


def test_loading_takes_the_thresholds_where_masks_are_held() -> None:
    toy = Toy(sparsity=0.75)
    first = toy.optimizer()
    toy.run(first, toy.schedule(first), 3)
    trained = trained_set(toy.parameters.items(), toy.config, 5)
    moved = [t.mask for t in trained]
    second = ZerothOrderOptimizer(
        [dict(group, params=list(group["params"])) for group in first.param_groups],
        trained,
        toy.config,
        5,
    )
    second.load_state_dict(first.state_dict())
    assert [t.mask for t in trained] == [t.mask for t in first.trained] != moved
    assert second.trained is trained


OTHERS = {
    "seed: got 6, allowed is 5": lambda: Toy().optimizer(seed=6),
    "noise: got 'gaussian', allowed is 'rademacher'": lambda: Toy(noise="gaussian").optimizer(),
    "update: got 'sign', allowed is 'sgd'": lambda: Toy(update="sign").optimizer(),
    "mode: got 'inplace', allowed is 'exact'": lambda: Toy(mode="inplace").optimizer(),
    "queries: got 2, allowed is 1": lambda: Toy(queries=2).optimizer(),
    "log_dtype: got 'float16'": lambda: Toy(log_dtype="float16").optimizer(),
    "betas: got": lambda: Toy(betas=(0.5, 0.5)).optimizer(),
    "trained set: layers.0.weight has dtype bfloat16, in the saved run float32": lambda: Toy(
        dtype=torch.bfloat16
    ).optimizer(),
    "sparsity: got 0.5, allowed is 0.0": lambda: Toy(sparsity=0.5).optimizer(),
    "mask: got 'random', allowed is 'magnitude'": lambda: Toy(mask="random").optimizer(),
    "trained set: lacks head.weight of the saved run, adds nothing": lambda: without("head.weight"),
    "trained set: head.weight has shape": lambda: reshaped("head.weight"),
}


def without(name: str) -> ZerothOrderOptimizer:
    toy = Toy()
    del toy.parameters[name]
    return toy.optimizer()


def reshaped(name: str) -> ZerothOrderOptimizer:
    toy = Toy()
    toy.parameters[name] = nn.Parameter(torch.ones(5, 70), False)
    return toy.optimizer()


@pytest.mark.parametrize(("reason", "make"), OTHERS.items(), ids=OTHERS.keys())
def test_another_run_is_refused_by_one_line(reason: str, make: Any) -> None:
    _, saved = whole_run({})
    other = make()
    before = [t.parameter.clone() for t in other.trained]
    with pytest.raises(ValueError) as caught:
        other.load_state_dict(saved.state_dict())
    message = str(caught.value)
    assert message.startswith(reason) and "\n" not in message
    assert other.updates == 0
    assert equal(before, [t.parameter for t in other.trained])


def test_a_run_under_way_keeps_its_thresholds() -> None:
    toy, other = Toy(sparsity=0.75), Toy(sparsity=0.75)
    for parameter in other.parameters.values():
        parameter.data.mul_(2)
    first, second = toy.optimizer(), other.optimizer()
    other.run(second, other.schedule(second), 1)
    with pytest.raises(ValueError, match=r"^thresholds: layers.0.weight has 0\.\d+, in the saved"):
        second.load_state_dict(first.state_dict())
    assert isinstance(second.trained[0].mask, Magnitude)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("zeroth_order"), "is of no zeroth-order run"),
        (lambda state: state["zeroth_order"]["header"].update(format=9), "its format is 9"),
        (lambda state: state["zeroth_order"]["header"].pop("noise"), "its header lacks noise"),
        (lambda state: state["zeroth_order"]["log"]["lengths"].add_(1), "lengths do not sum"),
    ],
)
def test_a_state_of_something_else_is_refused(change: Any, reason: str) -> None:
    _, optimizer = whole_run({})
    state = optimizer.state_dict()
    change(state)
    with pytest.raises(ValueError, match=reason):
        Toy().optimizer().load_state_dict(state)


def test_moments_of_another_shape_are_refused() -> None:
    _, optimizer = whole_run({"update": "momentum"})
    state = optimizer.state_dict()
    state["state"][0]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(ValueError, match="momentum_buffer: got shape"):
        Toy(update="momentum").optimizer().load_state_dict(state)
