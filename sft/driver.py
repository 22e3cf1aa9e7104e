"""Runs a sparse method inside any transformers Trainer, as a callback."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.adapters.base import SparseTuner
from sft.adapters.calibrate import Objective, calibrate, pending_adapters
from sft.adapters.dynamics import Dynamics
from sft.adapters.gathered import gathered
from sft.adapters.ranks import Ranks
from sft.adapters.resident import enter_resident, leave_resident, sync_resident
from sft.checkpoint import load_state, save_state
from sft.engines.engine import Engine, Removable
from sft.engines.find import stock_engine
from sft.identity import (
    base_fingerprint,
    method_settings,
    model_support_hash,
    sparse_tuner,
    support_checksum,
    warn_of_changes,
)
from sft.kernels.library import implementation
from sft.recompute import Floor, warn_of_checkpoints
from sft.rotation import check_rotation
from sft.stages import check_staged, keep_stage, stage_ends
from sft.updates import without_updates

logger = logging.getLogger(__name__)

PACKAGES = ("sparse-sft", "torch", "transformers", "peft", "accelerate")


class SparseCallback(TrainerCallback):  # type: ignore[misc]
    """Calibration, resident weights, drop and grow, and exact resume, for a stock Trainer.

    `SparseTrainer` adds one by itself. With a Trainer of your own:

        Trainer(model=model, args=args, train_dataset=ds, callbacks=[SparseCallback()]).train()

    A model without a sparse adapter is left alone. A Trainer tells its callbacks nothing of an
    error: `with sft.resident(model): trainer.train()` restores the base even then.

    Args:
        resume_from_checkpoint: the folder a resumed run continues from; by default
            `TrainingArguments.resume_from_checkpoint`, then `output_dir/checkpoint-N`.
        notes: plain values to keep beside every checkpoint, such as the resolved recipe.
    """

    def __init__(
        self,
        resume_from_checkpoint: str | Path | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.resume_from_checkpoint = resume_from_checkpoint
        self.notes = notes or {}
        self.adds_loss_terms = self.rotates = False  # set by a trainer that does
        self.replaced: dict[int, int] = {}
        self._dynamics: dict[str, Dynamics] = {}
        self.engine: Engine | None = None  # set by a trainer that knows it
        self.objective: Objective | None = None  # likewise
        self._ends: tuple[int, ...] = ()
        self._engine: Engine | None = None
        self._proximal: Removable | None = None
        self._floor: Floor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Calibrate, enter resident mode, and continue an interrupted run."""
        tuner = sparse_tuner(model)
        if tuner is None:
            return
        self._dynamics, self.replaced = {}, {}
        for name in tuner.active_adapters:
            dynamics = tuner.dynamics(name, state.max_steps)
            if dynamics is not None:
                self._dynamics[name] = dynamics
        # whatever is refused is refused before a weight is written
        implementation(args.device)
        if not self.rotates:
            check_rotation(args)
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu: got {args.n_gpu} in one process, whose replicas would write one weight; "
                "set CUDA_VISIBLE_DEVICES to one of them, or start a process each with torchrun"
            )
        running, optimizer = list(self._dynamics.values()), kwargs["optimizer"]
        engine = self._engine = self.engine or stock_engine(args, optimizer)
        check_processes(running, engine.ranks)
        engine.check(tuner)
        warn_of_checkpoints(model)
        _check_accumulators(any(d.reads_accumulators for d in running), engine)
        self._ends = stage_ends(tuner, state.max_steps)
        check_staged(kwargs.get("lr_scheduler"), self._ends)
        if len(self._ends) > 1:
            engine.check_staged()
        for dynamics in running:
            dynamics.ranks = engine.ranks
        penalties = [p for name in tuner.active_adapters for p in tuner.penalties(name)]
        if penalties:
            self._proximal = engine.shrink(penalties)
        if state.global_step == 0:
            for name in tuner.active_adapters:
                tuner.check_run(name, engine.stock, adds_loss_terms=self.adds_loss_terms)
        if any(d.reads_gradients for d in running):
            engine.watch(p for p in model.parameters() if p.requires_grad)
        self._floor = Floor(model)
        enter_resident(model)
        if state.global_step > 0:
            self._resume(args, state, model, tuner)
        else:
            with without_updates(optimizer):
                self._calibrate_pending(model, kwargs["train_dataloader"], engine)
        _check_alike(model, engine.ranks)

    def _calibrate_pending(self, model: nn.Module, batches: Any, engine: Engine) -> None:
        # the loader draws its shuffle from the global generator: training must not notice
        for name in pending_adapters(model):
            with torch.random.fork_rng():
                # DeepSpeed takes each gradient that reaches a parameter for one of the update's
                own = engine.name != "deepspeed"
                count = calibrate(
                    model, batches, name, engine.ranks, accumulate=own, objective=self.objective
                )
            logger.info("adapter %s: support chosen by %d batches", name, count)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let each method prepare for the update."""
        for dynamics in self._dynamics.values():
            dynamics.before_update(state.global_step, args.gradient_accumulation_steps)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Write the trained values to the weights and hand over the update's gradients."""
        scale = 1.0 if self._engine is None else self._engine.gradient_scale()
        for dynamics in self._dynamics.values():
            dynamics.after_gradients(scale)
        sync_resident(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Let each method change its support, and move the optimizer's state along."""
        engine = self._engine
        if engine is None:
            return
        moved = False
        for dynamics in self._dynamics.values():
            changes = dynamics.after_update(state.global_step, engine.accumulators)
            moved |= bool(changes)
            for change in changes:
                engine.move(change)
            count = sum(int((change.source < 0).sum()) for change in changes)
            if count:
                self.replaced[state.global_step] = count
                logger.info("step %d: %d weights replaced", state.global_step, count)
        if moved:
            _check_alike(kwargs.get("model"), engine.ranks)
        if len(self._ends) > 1 and state.global_step in self._ends:
            control.should_save = True
            self._end_stage(args, state, kwargs["model"], engine)

    def _end_stage(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, engine: Engine
    ) -> None:
        """Keep the stage, and let the optimizer begin anew before a checkpoint is written."""
        stage = self._ends.index(state.global_step) + 1
        record = {"step": state.global_step, **self.metrics()}
        logger.info("stage %d of %d ends: %s", stage, len(self._ends), record)
        with gathered(p for p in model.parameters() if p.requires_grad):
            # not in on_save: save_strategy="best" drops what is asked for here
            if args.should_save:
                keep_stage(model, Path(args.output_dir), stage, record)
        if state.global_step < state.max_steps:
            engine.begin_anew()

    def metrics(self) -> dict[str, float]:
        """Return what the method shows beside the loss, by adapter where several are active."""
        several = len(self._dynamics) > 1
        return {
            f"{adapter}/{key}" if several else key: value
            for adapter, dynamics in self._dynamics.items()
            for key, value in dynamics.metrics().items()
        }

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Complete the checkpoint with the method's state."""
        tuner = sparse_tuner(model)
        if tuner is None:
            return
        PartialState().wait_for_everyone()  # the mark names what each process wrote
        if not args.should_save:
            return
        tensors = {
            f"{adapter}//{name}": tensor
            for adapter, dynamics in self._dynamics.items()
            for name, tensor in dynamics.state().items()
        }
        notes = {
            "step": state.global_step,
            "support_sha256": model_support_hash(model),
            "base_fingerprint": base_fingerprint(model),
            "settings": _settings(tuner, state),
            "versions": {name: version(name) for name in PACKAGES},
            "resumable": not args.save_only_model,
            **self.notes,
        }
        save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", tensors, notes)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Leave resident mode: the base is pre-trained again, bit for bit."""
        self.finish(model)

    def finish(self, model: nn.Module) -> None:
        """Stop listening to backward and leave resident mode, whatever ended the training."""
        for dynamics in self._dynamics.values():
            dynamics.close()
        if self._proximal is not None:
            self._proximal.remove()
        if self._floor is not None:
            self._floor.remove()
        if self._engine is not None:
            self._engine.close()
        self._dynamics, self._engine, self._proximal, self._floor = {}, None, None, None
        self._ends = ()
        self.engine = None  # the next run may have another
        leave_resident(model)

    def _resume(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, tuner: SparseTuner
    ) -> None:
        folder = self._resume_folder(args, state)
        tensors, notes = load_state(folder)
        found = model_support_hash(model)
        if notes["step"] != state.global_step or notes["support_sha256"] != found:
            raise ValueError(
                f"resume_from_checkpoint: {folder} is of step {notes['step']} and support "
                f"{notes['support_sha256'][:12]}, the run is at step {state.global_step} with "
                f"{found[:12]}; name the folder with SparseCallback(resume_from_checkpoint=...)"
            )
        warn_of_changes(notes["settings"], _settings(tuner, state))
        for adapter, dynamics in self._dynamics.items():
            start = f"{adapter}//"
            parts = {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)}
            if not parts:
                raise ValueError(
                    f"growth: {folder} is of a run whose adapter {adapter!r} kept its support; "
                    "set growth='none', or start a new run from its adapter"
                )
            dynamics.load_state(parts)

    def _resume_folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        given = self.resume_from_checkpoint or args.resume_from_checkpoint
        if isinstance(given, (str, Path)):
            return Path(given)
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _settings(tuner: SparseTuner, state: TrainerState) -> dict[str, dict[str, Any]]:
    return {**method_settings(tuner), "trainer": {"max_steps": state.max_steps}}


def check_processes(running: list[Dynamics], ranks: Ranks) -> None:
    """Raise ValueError on what one process alone can do."""
    refused = [d.one_process for d in running if d.one_process is not None]
    if ranks.count > 1 and refused:
        raise ValueError(refused[0])


def _check_alike(model: Any, ranks: Ranks) -> None:
    """Raise RuntimeError unless the ranks have the same supports."""
    if ranks.count > 1:
        ranks.check_alike("supports", support_checksum(model))


def _check_accumulators(reads: bool, engine: Engine) -> None:
    if reads and not engine.keeps_accumulators():
        raise ValueError(
            "growth: 'momentum' reads SM3's row and column accumulators, which "
            f"{type(engine.stock).__name__} does not keep; set the method's optimizer='sm3'"
        )
