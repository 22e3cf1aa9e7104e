"""Zeroth-order steps that are timed side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import sft
from sft.adapters.layer import sparse_layers
from sft.adapters.resident import enter_resident
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.engine import Engine
from sft.optim.zeroth_order.exact import ExactMode
from sft.optim.zeroth_order.inplace import InplaceMode
from sft.optim.zeroth_order.modes import Mode, nothing
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.reference import ReferenceMode
from sft.optim.zeroth_order.trained import trained_set

Batch = dict[str, Tensor]
LR = 1e-9  # the cases share a model: what they do to it must not change what they cost


class Case:
    """A model and a zeroth-order step of it.

    Args:
        model: evaluated; what requires a gradient in it is trained.
        config: of the estimate; None for two forward passes and nothing else.
        after: writes trained values to where they are used.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ZerothOrderConfig | None,
        after: Callable[[], None] = nothing,
    ) -> None:
        self.model, self.after, self.engine = model, after, None
        self.trained, self._config = 0, config
        if config is not None:
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            trained = trained_set(named, config, 0)
            self.trained = sum(t.parameter.numel() for t in trained)
            self.optimizer = ZerothOrderOptimizer(
                [{"params": [t.parameter for t in trained], "lr": LR, "weight_decay": 0.0}],
                trained, config, 0,
            )  # fmt: skip
            self._trained = trained

    def inference(self, batch: Batch) -> float:
        """Evaluate the loss once."""
        with torch.no_grad():
            return float(self.model(**batch).loss)

    def step(self, batch: Batch) -> None:
        """Run one step."""
        if self._config is None:
            self.inference(batch)
            self.inference(batch)
            return
        if self.engine is None:
            mode = self._mode(batch)
            self.engine = Engine(self._config, self.optimizer, mode)
        self.engine.evaluate(lambda: self.inference(batch), last=True)
        self.optimizer.step()
        self.after()

    def held_bytes(self) -> int:
        """Return what stays between steps beside the model: scratch and copies."""
        mode: Any = getattr(self, "mode", None)
        if not isinstance(mode, ExactMode):
            return 0
        copies = sum(c.numel() * c.element_size() for c in mode._copies)
        return int(mode._scratch._buffer.numel() + copies)

    def _mode(self, batch: Batch) -> Mode:
        assert self._config is not None
        kind = self._config.noise
        if self._config.mode == "exact":
            forward = partial(self.inference, batch)
            self.mode: Mode = ExactMode(self.model, self._trained, kind, forward, self.after)
        elif self._config.mode == "inplace":
            self.mode = InplaceMode(self._trained, kind, self.after)
        else:
            self.mode = ReferenceMode(self._trained, self._config.eps, self.after)
        return self.mode


def floor(base: nn.Module, folder: Path) -> Case:
    return Case(base, None)


def exact(base: nn.Module, folder: Path) -> Case:
    return Case(base, ZerothOrderConfig())


def sparse(base: nn.Module, folder: Path) -> Case:
    return Case(base, ZerothOrderConfig(sparsity=0.75))


def gaussian(base: nn.Module, folder: Path) -> Case:
    return Case(base, ZerothOrderConfig(noise="gaussian_table"))


def inplace(base: nn.Module, folder: Path) -> Case:
    return Case(base, ZerothOrderConfig(mode="inplace"))


def reference(base: nn.Module, folder: Path) -> Case:
    return Case(base, ZerothOrderConfig(mode="reference"))


def support(base: nn.Module, folder: Path) -> Case:
    """Sparse deltas on 1 % of the linear layers' weights, resident."""
    config = sft.SpielConfig(
        density=0.01, growth="none", selection="magnitude", task_type="CAUSAL_LM"
    )
    model = get_peft_model(_copy(folder), config).eval()
    enter_resident(model)
    layers = list(sparse_layers(model).values())

    def after() -> None:
        for layer in layers:
            layer.sync(now=False)

    return Case(model, ZerothOrderConfig(), after)


def lora(base: nn.Module, folder: Path) -> Case:
    """PEFT LoRA, 16 ranks on all linear layers."""
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return Case(get_peft_model(_copy(folder), config).eval(), ZerothOrderConfig(eps=1e-2))


def _copy(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


CASES = (floor, exact, sparse, gaussian, inplace, reference, support, lora)
