"""Which engine a Trainer runs on."""

from __future__ import annotations

from typing import Any

import torch

from sft.adapters.ranks import ALONE, ProcessGroup, Ranks
from sft.engines.ddp import leave_buffers
from sft.engines.deepspeed_settings import check_deepspeed
from sft.engines.engine import Engine
from sft.engines.fsdp_settings import check_fsdp
from sft.engines.plain import PlainEngine


def engine_of(trainer: Any) -> Engine:
    """Return the engine of a Trainer whose model and optimizer are prepared.

    Raises:
        ValueError: no engine of ours fits.
    """
    if trainer.is_fsdp_enabled:
        from sft.engines.fsdp import FsdpEngine

        return FsdpEngine(trainer.model, trainer.optimizer, ranks_of(trainer.args))
    if trainer.is_deepspeed_enabled:
        from sft.engines.deepspeed import deepspeed_engine

        return deepspeed_engine(trainer, ranks_of(trainer.args))
    leave_buffers(trainer.model_wrapped, asked=trainer.args.ddp_broadcast_buffers)
    return PlainEngine(trainer.optimizer, ranks_of(trainer.args))


def check_engine(trainer: Any) -> None:
    """Raise ValueError on settings of an engine that can't run, before anything is sharded."""
    if trainer.args.fsdp or trainer.is_fsdp_enabled:  # asked for here, or by accelerate's launcher
        check_fsdp(trainer)
    if trainer.is_deepspeed_enabled:
        check_deepspeed(trainer)


def stock_engine(args: Any, optimizer: Any) -> Engine:
    """Return the engine of a stock Trainer, which tells its callbacks no more than this.

    Raises:
        ValueError: it shards: callbacks see none of it.
    """
    for key in ("deepspeed", "fsdp"):
        if getattr(args, key, None):
            raise ValueError(
                f"{key}: got a sharding engine under a stock Trainer, which hides it from "
                "callbacks; train with SparseTrainer"
            )
    return PlainEngine(optimizer, ranks_of(args))


def ranks_of(args: Any) -> Ranks:
    """Return the processes of a run."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if args.world_size == 1 or not started:
        return ALONE
    return ProcessGroup(args.device)
