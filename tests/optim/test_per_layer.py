"""Per-layer updates are those of the ordinary optimizer, one parameter at a time."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sft.optim.adamw import SparseAdamW
from sft.optim.per_layer import PerLayerOptimizer

Make = Callable[[Any], torch.optim.Optimizer]


def model(layers: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 6, generator=generator) for _ in range(count)]


def loss(net: nn.Module, batch: Tensor, share: int = 1) -> Tensor:
    out: Tensor = net(batch).square().mean() / share
    return out


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def fused(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, fused=True)


def grouped(params: Any) -> torch.optim.Optimizer:
    listed = list(params)
    groups = [{"params": listed[::2], "weight_decay": 0.5}, {"params": listed[1::2], "lr": 1e-3}]
    return torch.optim.AdamW(groups, lr=1e-2)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def ours(params: Any) -> torch.optim.Optimizer:
    return SparseAdamW(params, lr=1e-2)


def eight_bit(params: Any) -> torch.optim.Optimizer:
    bnb = pytest.importorskip("bitsandbytes")
    made: torch.optim.Optimizer = bnb.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=8)
    return made


MAKERS = [adamw, fused, grouped, sgd, ours, eight_bit]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor], k: int = 1) -> None:
    """Train on updates of k micro-batches under a schedule."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for start in range(0, len(data), k):
        for number, batch in enumerate(data[start : start + k], 1):
            if isinstance(optimizer, PerLayerOptimizer) and number < k:
                with optimizer.accumulating():
                    loss(net, batch, k).backward()
            else:
                loss(net, batch, k).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("k", [1, 4])
def test_fact24_equals_the_ordinary_optimizer(make: Make, k: int) -> None:
    stock, layered = model(), model()
    train(stock, make(stock.parameters()), batches(8), k)
    optimizer = PerLayerOptimizer(make(layered.parameters()))
    train(layered, optimizer, batches(8), k)
    for mine, other in zip(layered.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_gradients_live_one_layer_at_a_time() -> None:
    net, alive = model(), []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in net.parameters()))

    for parameter in net.parameters():
        # before the update's own hook
        parameter.register_post_accumulate_grad_hook(count)
    PerLayerOptimizer(adamw(net.parameters()))
    loss(net, batches(1)[0]).backward()
    assert len(alive) == 10
    assert max(alive) <= 2  # weight and bias of one layer
    assert all(p.grad is None for p in net.parameters())


def test_every_tensor_is_clipped_by_its_own_norm() -> None:
    stock, layered = model(), model()
    stepped = torch.optim.SGD(stock.parameters(), lr=1.0)
    optimizer = PerLayerOptimizer(torch.optim.SGD(layered.parameters(), lr=1.0), max_norm=1e-3)
    for net in (stock, layered):
        loss(net, batches(1)[0]).backward()
    for parameter in stock.parameters():
        nn.utils.clip_grad_norm_([parameter], 1e-3)
    stepped.step()
    optimizer.step()
    for mine, other in zip(layered.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", MAKERS)
def test_resumed_equals_uninterrupted(make: Make) -> None:
    whole, first, second = model(), model(), model()
    data = batches(6)
    optimizer = PerLayerOptimizer(make(whole.parameters()))
    interrupted = PerLayerOptimizer(make(first.parameters()))
    for batch in data:
        loss(whole, batch).backward()
        optimizer.step()
    for batch in data[:3]:
        loss(first, batch).backward()
        interrupted.step()
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    second.load_state_dict(first.state_dict())
    resumed = PerLayerOptimizer(make(second.parameters()))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for batch in data[3:]:
        loss(second, batch).backward()
        resumed.step()
    for mine, other in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_its_state_is_that_of_the_ordinary_optimizer() -> None:
    net, other = model(), model()
    optimizer = PerLayerOptimizer(adamw(net.parameters()))
    train(net, optimizer, batches(2))
    stock = adamw(other.parameters())
    stock.load_state_dict(optimizer.state_dict())
    step = optimizer.state[next(net.parameters())]["step"]
    assert step == stock.state[next(other.parameters())]["step"] == 2


def test_a_window_cut_short_is_stepped_by_step() -> None:
    stock, layered = model(), model()
    optimizer = PerLayerOptimizer(adamw(layered.parameters()))
    with optimizer.accumulating():
        loss(layered, batches(1)[0]).backward()
    assert all(p.grad is not None for p in layered.parameters())
    optimizer.step()
    loss(stock, batches(1)[0]).backward()
    adamw(stock.parameters()).step()
    for mine, other in zip(layered.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_whoever_knows_may_tell_which_is_last() -> None:
    net, last = model(), False
    optimizer = PerLayerOptimizer(adamw(net.parameters()), is_last=lambda: last)
    loss(net, batches(1)[0]).backward()
    assert not optimizer.state[next(net.parameters())]
    last = True
    loss(net, batches(1)[0]).backward()
    assert optimizer.state[next(net.parameters())]["step"] == 1


def test_hooks_of_a_step_fire_once_an_update() -> None:
    net, fired = model(), []
    optimizer = PerLayerOptimizer(adamw(net.parameters()))
    handle = register_optimizer_step_post_hook(lambda stepped, *_: fired.append(stepped))
    try:
        loss(net, batches(1)[0]).backward()
        optimizer.step()
    finally:
        handle.remove()
    assert fired == [optimizer]


def test_settings_of_single_modules_reach_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    net = model()
    inner = bnb.optim.AdamW8bit(net.parameters(), min_8bit_size=8)
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(net[0], "weight", {"optim_bits": 32})
    try:
        optimizer = PerLayerOptimizer(inner)
        loss(net, batches(1)[0]).backward()
    finally:
        manager.initialize()
    dtypes = [optimizer.state[layer.weight]["state1"].dtype for layer in net]
    assert dtypes == [torch.float32] + [torch.uint8] * 4


def test_closed_it_steps_in_backward_no_more() -> None:
    net = model()
    optimizer = PerLayerOptimizer(adamw(net.parameters()))
    optimizer.close()
    loss(net, batches(1)[0]).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_second_update_without_step_is_refused() -> None:
    net = model()
    PerLayerOptimizer(adamw(net.parameters()))
    loss(net, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"second backward came before step\(\)"):
        loss(net, batches(1)[0]).backward()


@pytest.mark.parametrize("unscale", [False, True])
def test_loss_scaling_is_refused(unscale: bool) -> None:
    net = model()
    optimizer = PerLayerOptimizer(adamw(net.parameters()))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(net, batches(1)[0])).backward()  # type: ignore[no-untyped-call]
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match=r"^GradScaler: got one, [^\n]*$"):
        scaler.step(optimizer)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"^per-layer updates: got 2 processes"):
        PerLayerOptimizer(adamw(model().parameters()))


def test_what_cannot_work_is_named() -> None:
    optimizer = PerLayerOptimizer(adamw(model().parameters()))
    with pytest.raises(ValueError, match=r"^closure: got one"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match=r"^param_groups: got one more"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match=r"^max_norm: got -1, allowed"):
        PerLayerOptimizer(adamw(model().parameters()), max_norm=-1)
