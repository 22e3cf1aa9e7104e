"""The mark of a whole checkpoint, for models without a sparse adapter."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.checkpoint import save_state
from sft.identity import sparse_tuner

PACKAGES = ("sparse-sft", "torch", "transformers", "accelerate")


class MarkCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Writes the mark once every process has written its part of a checkpoint."""

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Complete the checkpoint."""
        if sparse_tuner(model) is not None:
            return
        PartialState().wait_for_everyone()
        if args.should_save:
            notes = {
                "step": state.global_step,
                "versions": {name: version(name) for name in PACKAGES},
                "resumable": not args.save_only_model,
            }
            save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", {}, notes)
