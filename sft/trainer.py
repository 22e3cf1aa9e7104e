"""`SparseTrainer`: the transformers Trainer that trains a sparse part of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from sft.adapters.base import SparseTuner
from sft.adapters.layer import SparseLayer, sparse_layers
from sft.checkpoint import MARK, check_whole, last_whole_checkpoint
from sft.chunked_loss import ChunkedLossMixin
from sft.driver import SparseCallback
from sft.eight_bit import set_min_8bit_size
from sft.engines.training import EngineMixin
from sft.homes import ResidentHomes
from sft.identity import sparse_tuner
from sft.kernels.sm3 import Positions
from sft.mark_checkpoints import MarkCheckpoints
from sft.offload.config import OffloadConfig
from sft.offload.training import OffloadMixin
from sft.optim.adamw import SparseAdamW
from sft.optim.sm3 import SM3
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optimizer_name import optimizer_name
from sft.parameter_groups import split_groups
from sft.precision import keep_precision, trained_tensors
from sft.processes import check_in_touch
from sft.reference import ReferenceMixin
from sft.rotation import RotateCheckpoints, RotationMixin
from sft.stages import stage_ends, staged_scheduler
from sft.undisturbed import uncounted
from sft.updates import per_layer, wants_per_layer
from sft.zeroth_order.log import ZerothOrderLogCallback
from sft.zeroth_order.training import ZerothOrder


class SparseTrainingMixin(
    EngineMixin, ReferenceMixin, RotationMixin, ChunkedLossMixin, OffloadMixin
):
    """Put before a Trainer class: `class MyTrainer(SparseTrainingMixin, trl.SFTTrainer)`.

    Adds the sparse callback, the optimizer the method asks for, checkpoints that are known to be
    whole, and leaves the base weights as they were whatever ends the training. All settings of the
    method live in its PEFT configuration.

    Args:
        *args: passed on.
        zeroth_order: train by forward passes alone, whatever is trained; see `ZerothOrderConfig`.
        chunked_loss: compute the loss of a causal language model without whole logits, in training
            and where evaluation reads the loss alone.
        offload: what is kept off the device; see `OffloadConfig`.
        **kwargs: passed on.
    """

    sparse_callback: SparseCallback
    zeroth_order: ZerothOrder | None = None
    zeroth_order_log: ZerothOrderLogCallback
    optimizer: Any
    lr_scheduler: Any
    optimizer_cls_and_kwargs: tuple[type[Any], dict[str, Any]] | None

    def __init__(
        self,
        *args: Any,
        zeroth_order: ZerothOrderConfig | None = None,
        chunked_loss: bool = False,
        offload: OffloadConfig | None = None,
        **kwargs: Any,
    ) -> None:
        given_model = kwargs.get("model", args[0] if args else None)
        settings = kwargs.get("args", args[1] if len(args) > 1 else None)
        self._begin_offload(offload, given_model, settings, kwargs.get("peft_config"))
        self._expect_reference(given_model)
        trained = trained_tensors(given_model)
        super().__init__(*args, **kwargs)
        self._chunk_loss(chunked_loss)
        keep_precision(self.model, trained)
        self._settle_reference()
        given = [c for c in self.callback_handler.callbacks if isinstance(c, SparseCallback)]
        self.sparse_callback = given[0] if given else SparseCallback()
        if not given:
            self.add_callback(self.sparse_callback)
        self.sparse_callback.adds_loss_terms = self.sparse_callback.rotates = True
        self.sparse_callback.objective = self._objective
        if zeroth_order is not None:
            self.zeroth_order = ZerothOrder(self, zeroth_order)
            self.zeroth_order_log = ZerothOrderLogCallback()
            self.add_callback(self.zeroth_order_log)
            self.add_callback(MarkCheckpoints())
        self.add_callback(RotateCheckpoints())

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train, as `Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one.
            *args: passed on.
            **kwargs: passed on.

        Raises:
            ValueError: there is no whole checkpoint to resume from, or processes that were started
                together do not find one another.
        """
        check_in_touch(self.args)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_checkpoint()
        try:
            with self._zeroth_order_training(resumed=bool(resume_from_checkpoint)):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.sparse_callback.finish(self.model)

    def _newest_checkpoint(self) -> str | bool:
        """Return the newest whole checkpoint; True lets the Trainer choose among unmarked ones."""
        folder = last_whole_checkpoint(Path(self.args.output_dir))
        if folder is None and self._must_be_whole():
            raise ValueError(
                f"resume_from_checkpoint: {self.args.output_dir} holds no whole checkpoint"
            )
        return True if folder is None else str(folder)

    def _must_be_whole(self) -> bool:
        """Whether a stock Trainer's checkpoint, which has no mark, lacks what a run needs."""
        return sparse_tuner(self.model) is not None or self.zeroth_order is not None

    def _zeroth_order_training(self, *, resumed: bool) -> AbstractContextManager[None]:
        return self.zeroth_order.training(resumed=resumed) if self.zeroth_order else nullcontext()

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Create the optimizer that the method asks for, unless one was given or named."""
        if self.zeroth_order is not None:
            self.optimizer = self.zeroth_order.optimizer(self.optimizer)
            return self._offload_optimizer(self.optimizer)
        tuner = sparse_tuner(self.model)
        given = self.optimizer_cls_and_kwargs
        if tuner is not None and given is None:
            self.optimizer_cls_and_kwargs = method_optimizer(tuner, self.args)
        made_here = self.optimizer is None
        try:
            optimizer = super().create_optimizer(model)
        finally:
            # the next run may have another model or learning rate
            self.optimizer_cls_and_kwargs = given
        set_min_8bit_size(optimizer, self.args.optim_args)
        if tuner is not None and made_here:
            for name in tuner.active_adapters:
                split_groups(optimizer, tuner.parameter_groups(name, self.args.learning_rate))
            if wants_per_layer(tuner):
                optimizer = self.optimizer = per_layer(self, optimizer)
        return self._offload_optimizer(optimizer)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Create the learning rate schedule; for a method with stages, once for each of them."""
        tuner, made_here = sparse_tuner(self.model), self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        ends = (num_training_steps,) if tuner is None else stage_ends(tuner, num_training_steps)
        if made_here and len(ends) > 1:
            self.lr_scheduler = staged_scheduler(optimizer or self.optimizer, self.args, ends)
            return self.lr_scheduler
        return scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, beside the loss, what the method shows."""
        if "loss" in logs:
            logs |= self.sparse_callback.metrics()
            if self.zeroth_order is not None:
                logs.pop("grad_norm", None)  # of gradients that do not exist
                logs |= self.zeroth_order.metrics()
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss; in training, with the terms that the method adds to it."""
        estimated = self.zeroth_order is not None and not return_outputs
        if not (estimated and model.training and torch.is_grad_enabled()):
            return self._loss_with_terms(model, inputs, return_outputs, num_items_in_batch)
        assert self.zeroth_order is not None
        objective = self.zeroth_order.objective(model, inputs)

        def evaluate() -> Any:
            # a copy, as the Trainer takes labels out of it where it smooths them
            return self._loss_with_terms(model, dict(inputs), False, num_items_in_batch)

        micro_batches = self.current_gradient_accumulation_steps
        scaled = self._is_scaled(num_items_in_batch)
        scale = 1.0 if scaled and objective is None else 1 / micro_batches
        value = self.zeroth_order.loss(objective or evaluate, scale)
        shown = value if scaled else value * micro_batches  # the Trainer divides by them again
        # a leaf: backward ends where it begins
        return torch.tensor(shown, device=self.args.device, requires_grad=True)

    def _objective(self, batch: Any) -> Any:
        """Return the trainer's own loss of a batch from its loader, and count nothing."""
        with uncounted(self):
            return super().compute_loss(self.model, self._prepare_inputs(batch))

    def _loss_with_terms(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, count: Any
    ) -> Any:
        """Return the trainer's own loss and what the method adds to it in training."""
        found = super().compute_loss(model, inputs, return_outputs, count)
        tuner = sparse_tuner(self.model)
        if tuner is None or not model.training:
            return found
        terms = [term for n in tuner.active_adapters if (term := tuner.loss_terms(n)) is not None]
        if not terms:
            return found
        # once an update: the Trainer divides by the micro-batches a loss that is a mean over each
        term = torch.stack(terms).sum()
        term = term / self.current_gradient_accumulation_steps if self._is_scaled(count) else term
        return (found[0] + term, *found[1:]) if return_outputs else found + term

    def _is_scaled(self, count: Any) -> bool:
        """Whether the losses of the micro-batches add up to that of the update."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and count is not None
            scaled = counted or self.compute_loss_func is not None
        return bool(scaled)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if self._must_be_whole() or (folder / MARK).is_file():
            check_whole(folder)
        if sparse_tuner(self.model) is not None:
            self.sparse_callback.resume_from_checkpoint = folder
        if self.zeroth_order is not None:
            self.zeroth_order_log.resumed_from = folder
        super()._load_from_checkpoint(resume_from_checkpoint, model)


class SparseTrainer(SparseTrainingMixin, Trainer):  # type: ignore[misc]
    """Drop-in for `transformers.Trainer`.

        model = get_peft_model(base, SpielConfig(density=0.005, task_type="CAUSAL_LM"))
        SparseTrainer(model=model, args=TrainingArguments(...), train_dataset=ds).train()

    Args:
        model: a PeftModel with a sparse adapter, or a base model if `peft_config` is given.
        args: as for Trainer.
        *rest: as for Trainer.
        peft_config: wraps `model` by `get_peft_model` first.
        **kwargs: as for Trainer.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        super().__init__(model, args, *rest, **kwargs)


def method_optimizer(
    tuner: SparseTuner, args: TrainingArguments
) -> tuple[type[Any], dict[str, Any]] | None:
    """Return the optimizer class and arguments for a method, or None for the Trainer's own.

    Args:
        tuner: its active adapter's configuration names the optimizer.
        args: give learning rate, betas and epsilon; an `optim` other than the default wins over
            "auto".

    Raises:
        ValueError: `args.optim_args` are given for an optimizer of ours, which takes none.
    """
    config = tuner.peft_config[tuner.active_adapters[0]]
    name = optimizer_name(config, args)
    if name == "trainer":
        return None
    if args.optim_args:
        raise ValueError(
            f"optim_args: got {args.optim_args!r}, which {name} of the method does not take; "
            "set the method's optimizer='trainer' to use the one that optim names"
        )
    if name == "sm3":
        return SM3, {"lr": args.learning_rate, "positions": _positions(tuner)}
    return SparseAdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "reference": config.reference,
        # updates in backward must not write weights that the rest of backward may read
        "homes": None if wants_per_layer(tuner) else ResidentHomes(tuner),
    }


def _positions(tuner: SparseTuner) -> Any:
    """Return a look-up from a values parameter to where its entries lie now."""
    places: dict[int, tuple[nn.Parameter, SparseLayer, str]] = {}

    def look_up(parameter: nn.Parameter) -> Positions | None:
        held, layer, adapter = places.get(id(parameter), (None, None, ""))
        if held is not parameter:  # not asked before, or a sharder has put others in their places
            places.clear()
            places.update(_places(tuner))
            _, layer, adapter = places.get(id(parameter), (None, None, ""))
        pattern = None if layer is None else layer.pattern(adapter)
        if pattern is None:
            return None
        return Positions(pattern.rows(), pattern.columns.long(), pattern.shape)

    return look_up


def _places(tuner: SparseTuner) -> dict[int, tuple[nn.Parameter, SparseLayer, str]]:
    """Return by identity the values of all layers, and whose they are."""
    return {
        id(values): (values, layer, adapter)
        for layer in sparse_layers(tuner).values()
        for adapter, values in layer.trained_values.items()
    }
