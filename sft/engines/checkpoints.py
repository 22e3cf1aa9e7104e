"""The optimizer's state beside a checkpoint, whole and by name: any engine can go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sft.engines.engine import Engine
from sft.engines.masters import is_value
from sft.engines.optimizer_state import OptimizerState, named, names_of
from sft.engines.schedule_state import with_empty, without_empty
from sft.optim.offloaded import OffloadedOptimizer

STATE = "sft_optimizer.safetensors"


def save_optimizer(trainer: Any, engine: Engine, folder: Path) -> None:
    """Write the engine's state and the learning rate schedule; every rank takes part, one writes.

    Args:
        trainer: a transformers Trainer.
        engine: it runs on.
        folder: the checkpoint.
    """
    tensors = engine.state()
    if trainer.args.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, folder / STATE, metadata={"format": "pt"})
        schedule = without_empty(trainer.lr_scheduler.state_dict(), engine.groups())
        torch.save(schedule, folder / SCHEDULER_NAME)


def load_optimizer(trainer: Any, engine: Engine, folder: Path) -> None:
    """Take over the optimizer's state and schedule of a checkpoint, whatever engine wrote it.

    Raises:
        ValueError: it holds neither our state nor a plain optimizer's.
    """
    names, groups = names_of(trainer.model), engine.groups()
    saved_groups: list[list[int]] = []  # ours has no entries for empty groups
    if (folder / STATE).is_file():
        tensors = safetensors.torch.load_file(folder / STATE)
    elif (folder / OPTIMIZER_NAME).is_file():
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        tensors = named(saved, groups, names)
        saved_groups = [group["params"] for group in saved["param_groups"]]
    else:
        raise ValueError(
            f"resume_from_checkpoint: {folder} holds no {STATE} and no {OPTIMIZER_NAME}; resume "
            "from a checkpoint of a sparse adapter that was saved with its optimizer"
        )
    if engine.consolidates:
        engine.load_state(tensors)
    else:
        kept = {name: tensor for name, tensor in tensors.items() if not is_value(name)}
        _scatter(engine.stock, names, kept)
    schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
    schedule = without_empty(schedule, saved_groups)
    own = trainer.lr_scheduler.state_dict()
    trainer.lr_scheduler.load_state_dict(with_empty(schedule, groups, own))


def _scatter(stock: Any, names: dict[int, str], tensors: dict[str, Tensor]) -> None:
    """Let an optimizer take state by name; one that is offloaded keeps it by its stand-ins."""
    if not isinstance(stock, OffloadedOptimizer):
        OptimizerState(stock).scatter(names, tensors)
        return
    OptimizerState(stock.inner).scatter(stock.stand_in_names(names), tensors)
    stock.take_options()


def saved_values(folder: Path) -> dict[str, Tensor]:
    """Return the values that an engine's state holds in a checkpoint, if it does."""
    path = folder / STATE
    found = safetensors.torch.load_file(path) if path.is_file() else {}
    return {key: tensor for key, tensor in found.items() if is_value(key)}
