"""Ways to train that are timed side by side: a model, its optimizer, and one step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import sft
from sft.adapters.deltas.window import Window
from sft.adapters.layer import sparse_layers
from sft.adapters.resident import enter_resident, sync_resident
from sft.optim.adamw import SparseAdamW
from sft.optim.prox import attach

Batch = dict[str, Tensor]


class Case:
    """One way to train: a model, its optimizer, and a step.

    Args:
        model: trained in place.
        optimizer: None for the floor, which updates nothing.
        before: runs before each step, outside the clock.
        after: runs after each optimizer step, inside the clock.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.optimizer, self.before, self.after = model, optimizer, before, after

    def step(self, batch: Batch) -> float:
        """Run one step; return its process CPU seconds."""
        self.before()
        start = time.process_time()
        self.model(**batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.after()
        return time.process_time() - start

    def saved_bytes(self, batch: Batch) -> int:
        """Count the bytes that autograd keeps between forward and backward."""
        own = {_storage(t) for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in own:
                kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**batch).loss
        del loss
        return sum(kept.values())

    def held_bytes(self) -> int:
        """Count the bytes of parameters, indices and optimizer state, after a step."""
        state = [] if self.optimizer is None else self.optimizer.state.values()
        layers = sparse_layers(self.model).values()
        patterns = [p for layer in layers if (p := layer.pattern("default")) is not None]
        tensors = [
            *self.model.parameters(),
            *self.model.buffers(),
            *(t for p in patterns for t in (p.indices, p.columns, p.row_pointers)),
            *(t for parts in state for t in parts.values() if isinstance(t, Tensor)),
        ]
        return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def full(base: nn.Module) -> Case:
    """Full fine-tuning, fused AdamW."""
    return Case(base, torch.optim.AdamW(base.parameters(), lr=1e-5, fused=True))


def lora(base: nn.Module) -> Case:
    """Stock PEFT LoRA, r=16 on every linear layer but the head, fused AdamW."""
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    return Case(model, torch.optim.AdamW(trained, lr=1e-4, fused=True))


def floor(base: nn.Module) -> Case:
    """Forward and input gradients alone: what no method that trains every layer can undercut."""
    base.requires_grad_(False)
    base.enable_input_require_grads()
    return Case(base, None)


def adapted(base: nn.Module, config: Any) -> Case:
    """Adapted, with resident weights and fused AdamW."""
    model = get_peft_model(base, config)
    enter_resident(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    return Case(model, optimizer, after=lambda: sync_resident(model))


def s2ft(base: nn.Module) -> Case:
    """S2FT: 1% of the o and down projections, whole input channels."""
    return adapted(base, sft.S2FTConfig(density=0.01, selection="random"))


def sora(base: nn.Module) -> Case:
    """SoRA r=16 on every linear layer but the head, with its proximal step."""
    return _with_proximal_step(adapted(base, sft.SoRAConfig(r=16, strength=1e-3)))


def sora_half(base: nn.Module) -> Case:
    """The same after half of the ranks have died and left."""
    case = adapted(base, sft.SoRAConfig(r=16, strength=1e-3))
    for layer in sparse_layers(case.model).values():
        layer.keep_ranks("default", torch.arange(8))
    return _with_proximal_step(case)


def _with_proximal_step(case: Case) -> Case:
    attach(case.optimizer, case.model.base_model.penalties("default"))
    return case


def sltrain(base: nn.Module) -> Case:
    """SLTrain from scratch: the same shapes as c B A + S, r=128, density 3%."""
    model = sft.pretrain_model(base.config, sft.SLTrainConfig(r=128, alpha=32, density=0.03))
    trained = [p for p in model.parameters() if p.requires_grad]
    return Case(model, torch.optim.AdamW(trained, lr=1e-4, fused=True))


def sltrain_finetune(base: nn.Module) -> Case:
    """SLTrain beside the frozen weights: r=16, density 0.5%, S resident."""
    return adapted(base, sft.SLTrainConfig(r=16, density=0.005))


def spiel(base: nn.Module) -> Case:
    """SpIEL between windows: density 0.5% of the same layers, resident, sparse AdamW."""
    case = adapted(base, sft.SpielConfig(density=0.005, target_modules="all-linear"))
    case.optimizer = SparseAdamW([p for p in case.model.parameters() if p.requires_grad], lr=1e-4)
    return case


def spiel_aside(base: nn.Module) -> Case:
    """The same deltas with the base untouched: y = base(x) + x Delta^T."""
    case = spiel(base)
    for layer in sparse_layers(case.model).values():
        layer.leave_resident()
    return case


def spiel_window(base: nn.Module) -> Case:
    """SpIEL-AG inside a window: the gradient at as many candidates is read too."""
    case = spiel(base)
    windows: list[Window] = []

    def before() -> None:
        if not windows:
            for layer in sparse_layers(case.model).values():
                windows.append(_window(layer))

    return Case(case.model, case.optimizer, before, after=_closing(case, windows))


def spiel_window_start(base: nn.Module) -> Case:
    """SpIEL-AG at the first update of a window: every gradient entry is looked at once."""
    case = spiel(base)
    windows: list[Window] = []

    def before() -> None:
        windows[:] = [_window(layer) for layer in sparse_layers(case.model).values()]

    return Case(case.model, case.optimizer, before, after=_closing(case, windows))


def _window(layer: Any) -> Window:
    return Window(layer.site("default"), include_active=False, whole_update=False)


def _closing(case: Case, windows: list[Window]) -> Callable[[], None]:
    def after() -> None:
        case.after()
        for window in windows:
            window.close_update(1.0)

    return after


CASES = (
    full,
    lora,
    floor,
    s2ft,
    sora,
    sora_half,
    sltrain,
    sltrain_finetune,
    spiel,
    spiel_window,
    spiel_window_start,
    spiel_aside,
)
PROFILED = (floor, lora, s2ft, sora, spiel)
