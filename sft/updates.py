"""Per-layer updates in a Trainer: who wants them, and when they happen."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.optim import Optimizer

from sft.adapters.base import SparseTuner
from sft.optim.per_layer import PerLayerOptimizer


def wants_per_layer(tuner: SparseTuner) -> bool:
    """Tell whether the configuration of an active adapter asks for per-layer updates."""
    configs = (tuner.peft_config[name] for name in tuner.active_adapters)
    return any(getattr(config, "per_layer_updates", False) for config in configs)


def per_layer(trainer: Any, optimizer: Optimizer) -> PerLayerOptimizer:
    """Let a Trainer's optimizer step in the backward of the last micro-batch of each update.

    Raises:
        ValueError: the Trainer scales the loss, or runs several processes.
    """
    if trainer.accelerator.scaler is not None:
        raise ValueError(
            "fp16: got True with per_layer_updates, which step before an overflow is known; set "
            "bf16=True, or per_layer_updates=False"
        )
    return PerLayerOptimizer(
        optimizer,
        max_norm=trainer.args.max_grad_norm,
        is_last=lambda: trainer.is_in_train and trainer.accelerator.sync_gradients,
    )


def check_per_layer(tuner: SparseTuner, optimizer: Optimizer) -> None:
    """Raise if per-layer updates are asked for and `optimizer` makes none."""
    if wants_per_layer(tuner) and _found(optimizer) is None:
        raise ValueError(
            f"per_layer_updates: got True, but {type(optimizer).__name__} steps after backward; "
            "train with SparseTrainer, or wrap the optimizer in sft.optim.per_layer"
        )


def without_updates(optimizer: Optimizer) -> AbstractContextManager[None]:
    """Let backward passes in the block move nothing."""
    found = _found(optimizer)
    return nullcontext() if found is None else found.accumulating()


def _found(optimizer: Any) -> PerLayerOptimizer | None:
    """Return the optimizer of ours among wrappers around wrappers."""
    while optimizer is not None and not isinstance(optimizer, PerLayerOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
