"""What a Trainer does otherwise where its engine shards a model with a sparse adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sft.adapters.gathered import gathered
from sft.engines.adapter_state import load_adapters, whole_adapters
from sft.engines.checkpoints import STATE, load_optimizer, save_optimizer, saved_values
from sft.engines.engine import Engine
from sft.engines.find import check_engine, engine_of
from sft.engines.masters import full_precision, load_values, values_of
from sft.identity import sparse_tuner

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class EngineMixin(_Base):  # type: ignore[misc]
    """Checkpoints that hold the adapter and the optimizer's state whole, whatever shards them.

    So they are as small as those of one process, and a run goes on from them on any number of
    processes and on any engine.
    """

    sparse_callback: Any
    model: Any
    _engine: Engine | None = None
    _has_adapter = False  # of the checkpoint that is resumed

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Prepare as ever, and tell the callback on which engine the run is."""
        if sparse_tuner(self.model) is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        check_engine(self)
        self._engine, self._has_adapter = None, False
        if resume_from_checkpoint is not None and self._is_sharded:
            # while the model is whole: a file is checked against the base weights
            self._load_from_checkpoint(resume_from_checkpoint, self.model)
            self._has_adapter = True
        # DeepSpeed would look for its own files in the checkpoint
        theirs = None if self.is_deepspeed_enabled else resume_from_checkpoint
        masters = full_precision(self.model) if self.is_deepspeed_enabled else {}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, theirs)
        engine = self.sparse_callback.engine = self._running_engine()
        if self.is_deepspeed_enabled:
            load_values(engine, masters)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._has_adapter = False
        return prepared

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _running_engine(self) -> Engine:
        if self._engine is None:
            self._engine = engine_of(self)
        return self._engine

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self._has_adapter:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best adapter into shards that are whole for the moment."""
        best = self.state.best_model_checkpoint
        if sparse_tuner(self.model) is None or not self._is_sharded or best is None:
            super()._load_best_model()
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.is_fsdp_enabled:  # PEFT gives its shards their rows of a file
            super()._load_from_checkpoint(best, self.model)
            return
        with gathered(trained):
            load_adapters(self.model, Path(best))
        engine = self._running_engine()
        engine.publish(trained)
        load_values(engine, saved_values(Path(best)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or sparse_tuner(self.model) is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        engine = self._running_engine()
        if engine.consolidates or (Path(checkpoint) / STATE).is_file():
            load_optimizer(self, engine, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        engine = self.sparse_callback.engine
        if engine is None or not engine.consolidates:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            save_optimizer(self, engine, Path(output_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, as `Trainer.save_model`; of sharded weights the adapter alone."""
        if sparse_tuner(self.model) is None or not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        masters = {} if self._engine is None else values_of(self._engine)
        self._save(output_dir, state_dict=whole_adapters(self.model) | masters)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
