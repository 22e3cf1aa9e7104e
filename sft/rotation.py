"""Deletes old checkpoints once the newest is marked whole, where a Trainer does so before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class RotationMixin(_Base):  # type: ignore[misc]
    """A Trainer that leaves old checkpoints to `RotateCheckpoints`, its last callback."""

    args: TrainingArguments
    _limit: int | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if trial is not None:  # of a search, whose folders are others
            super()._save_checkpoint(model, trial)
            return
        self._limit = self.args.save_total_limit
        with _limited(self.args, None):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save, with the arguments as they were given."""
        with _limited(self.args, self.args.save_total_limit or self._limit):
            super()._save(output_dir, state_dict)


class RotateCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Keeps `save_total_limit` checkpoints; comes after the callbacks that mark them."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Delete the oldest."""
        if args.should_save:
            rotate_checkpoints(
                args.output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True
            )


def check_rotation(args: TrainingArguments) -> None:
    """Raise ValueError if a stock Trainer may for a moment keep no whole checkpoint."""
    if args.save_total_limit == 1 and args.save_strategy != "no":
        raise ValueError(
            "save_total_limit: got 1 under a stock Trainer, which deletes the only whole "
            "checkpoint before the next is complete, allowed is 2 or more; or train with "
            "SparseTrainer"
        )


@contextmanager
def _limited(args: TrainingArguments, limit: int | None) -> Iterator[None]:
    before, args.save_total_limit = args.save_total_limit, limit
    try:
        yield
    finally:
        args.save_total_limit = before
