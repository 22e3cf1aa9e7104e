"""A run in stages: each has a learning rate schedule and an optimizer of its own, and is kept.

All stages lie in one training run, so that a checkpoint anywhere in it continues exactly.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from sft.adapters.base import SparseTuner
from sft.whole import written_whole

Multiplier = Callable[[int], float]


def stage_ends(tuner: SparseTuner, total_steps: int) -> tuple[int, ...]:
    """Return the updates after which a stage of the run ends; the last one ends the run.

    Raises:
        ValueError: active adapters disagree.
    """
    found = {tuner.stage_ends(name, total_steps) for name in tuner.active_adapters}
    if len(found) > 1:
        raise ValueError(
            f"strength: got active adapters whose stages end at {sorted(found)}, allowed is one "
            "schedule for all; train them one after another"
        )
    return found.pop() if found else (total_steps,)


def staged_scheduler(optimizer: Any, args: TrainingArguments, ends: Sequence[int]) -> LambdaLR:
    """Return a scheduler that runs the schedule of `args` once for each stage, warm-up included.

    Args:
        optimizer: its groups give the peak learning rates.
        args: `lr_scheduler_type`, its options and the warm-up; a warm-up given in updates is taken
            in each stage.
        ends: updates after which each stage ends.

    Raises:
        ValueError: the schedule is not a function of the step, so that it can't begin anew.
    """
    starts = [0, *ends[:-1]]
    stages = [_multiplier(args, end - start) for start, end in zip(starts, ends, strict=True)]
    return LambdaLR(optimizer, partial(_staged, tuple(starts), tuple(stages)))


def check_staged(scheduler: Any, ends: Sequence[int]) -> None:
    """Raise unless the scheduler begins anew with each stage.

    Raises:
        ValueError: it is another one: a stock Trainer's, or one that was handed over.
    """
    if len(ends) == 1:
        return
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    found = getattr(inner, "lr_lambdas", [None])[0]
    if getattr(found, "func", None) is not _staged:
        raise ValueError(
            f"strength: got {len(ends)} stages with a {type(scheduler).__name__} that runs once, "
            "allowed is one that begins anew with each stage; train with SparseTrainer and let it "
            "make the scheduler"
        )


def keep_stage(model: nn.Module, output: Path, stage: int, record: dict[str, Any]) -> Path:
    """Write the adapter as it is at the end of a stage, where no rotation of checkpoints looks.

    Args:
        model: a PeftModel.
        output: folder of the run.
        stage: from 1.
        record: plain values, written beside it as stage.json.
    """
    folder = output / f"stage-{stage}"
    with written_whole(folder) as temporary:
        model.save_pretrained(temporary)  # type: ignore[operator]
        content = json.dumps({"stage": stage, **record}, indent=1)
        (temporary / "stage.json").write_text(content + "\n", encoding="utf-8")
    return folder


def _multiplier(args: TrainingArguments, length: int) -> Multiplier:
    """Return the learning rate of a run of this length by step, relative to its peak."""
    # some schedules read the learning rate, none reads the parameters
    stand_in = torch.optim.SGD([torch.zeros(0, requires_grad=True)], lr=args.learning_rate)
    options = dict(args.lr_scheduler_kwargs or {})
    found = get_scheduler(
        args.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=args.get_warmup_steps(length),
        num_training_steps=length,
        scheduler_specific_kwargs=options,
    )
    if not isinstance(found, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type: got {args.lr_scheduler_type.value!r} with a schedule of stages, "
            "allowed are those that depend on the step alone, such as linear or cosine"
        )
    multiplier: Multiplier = found.lr_lambdas[0]
    return multiplier


def _staged(starts: Sequence[int], stages: Sequence[Multiplier], step: int) -> float:
    stage = bisect.bisect_right(starts, step) - 1
    return stages[stage](step - starts[stage])
