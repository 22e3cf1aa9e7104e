"""Zeroth-order training inside any transformers Trainer: forward passes in place of backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn

from sft.adapters.calibrate import calibrate, pending_adapters
from sft.adapters.layer import sparse_layers
from sft.adapters.ranks import ALONE as ONE_RANK
from sft.adapters.resident import sync_layers
from sft.engines.find import ranks_of
from sft.identity import sparse_tuner
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.engine import Engine
from sft.optim.zeroth_order.exact import ExactMode
from sft.optim.zeroth_order.inplace import InplaceMode
from sft.optim.zeroth_order.keys import step_key
from sft.optim.zeroth_order.modes import Mode, nothing
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.reference import ReferenceMode
from sft.optim.zeroth_order.trained import trained_set
from sft.undisturbed import undisturbed
from sft.zeroth_order.checks import check_run, check_trained
from sft.zeroth_order.objectives import NAMED
from sft.zeroth_order.processes import make_alike, processes, unwrapped


class ZerothOrder:
    """What a trainer does differently when it trains by forward passes alone.

    Its `compute_loss` evaluates both sides and returns their mean as a leaf: the loop, its
    callbacks, accumulation and schedules go on as ever, backward finds nothing to do, and the
    optimizer's step applies what was estimated.

    Args:
        trainer: a SparseTrainingMixin, constructed.
        config: of the run.

    Raises:
        ValueError: the trainer's arguments ask for what has no meaning without gradients.
    """

    def __init__(self, trainer: Any, config: ZerothOrderConfig) -> None:
        self.trainer, self.config = trainer, config
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._made_for: set[int] = set()  # `id`s of what required a gradient
        self._engine: Engine | None = None
        self._micro_batches = 0
        self._running = self._resumed = False
        check_run(trainer, config)

    @property
    def seed(self) -> int:
        """Of the directions."""
        given = self.config.seed
        return int(self.trainer.args.seed if given is None else given)

    @contextmanager
    def training(self, *, resumed: bool) -> Iterator[None]:
        """Keep the trained set frozen while the trainer runs: nothing wraps it for gradients."""
        self._running, self._resumed = True, resumed
        try:
            with unwrapped(self.trainer.accelerator):
                yield
        finally:
            if self._engine is not None:
                self._engine.close()
            for _, parameter in self._parameters:
                parameter.requires_grad_(True)
            self._engine, self._parameters = None, []
            self._running, self._micro_batches = False, 0

    def optimizer(self, given: Any = None) -> Any:
        """Return an optimizer of the trained set as it is now, or the one that was made before.

        In training the trained set is frozen from here on: the model is the one that is trained,
        also where a `model_init` makes it.

        Raises:
            ValueError: the trainer was given an optimizer of gradients, or something else is to be
                trained than what the optimizer was made for.
        """
        if self._running and not self._parameters:
            self._freeze(self.trainer.model)
        parameters = self._parameters or _trainable(self.trainer.model)
        wanted = {id(parameter) for _, parameter in parameters}
        if given is not None:
            _check_same(stepping(given), self._made_for, wanted)
            return given
        self._made_for = wanted
        trained = trained_set(parameters, self.config, self.seed)
        groups = _groups(self.trainer, [(t.name, t.parameter) for t in trained])
        model = self.trainer.model
        several = self.trainer.accelerator.num_processes if self.config.parallel == "queries" else 1
        return ZerothOrderOptimizer(
            groups,
            trained,
            self.config,
            self.seed,
            queries=self.config.queries * several,
            model_size=sum(p.numel() for p in model.parameters()),
        )

    def loss(self, evaluate: Callable[[], Any], scale: float) -> float:
        """Evaluate a micro-batch at displaced weights; with the last one the update is proposed.

        Args:
            evaluate: returns the loss of the micro-batch as the weights stand.
            scale: its part in the loss of the update.

        Returns:
            its loss times `scale`: the mean of what was evaluated.
        """
        optimizer = stepping(self.trainer.optimizer)
        self._micro_batches += 1
        place = (self._micro_batches, self.trainer.args.process_index)
        seed = step_key(step_key(self.seed, *place), optimizer.updates, 0)
        first = chain((True,), repeat(False))

        def once(count: bool | None = None) -> float:
            counted = next(first) if count is None else count
            with undisturbed(self.trainer, seed, dropout=self.config.dropout, count=counted):
                value = float(torch.as_tensor(evaluate()).detach().double())
            return value * scale

        if self._engine is None:
            self._engine = self._start(optimizer, partial(once, count=False))
        last = self.trainer.accelerator.sync_gradients
        value = self._engine.evaluate(once, last=last)
        if last:
            self._micro_batches = 0
        return value

    def metrics(self) -> dict[str, float]:
        """Return what the log shows besides the loss."""
        if self._engine is None:
            return {}
        gradients = self._engine.last_gradients
        mean = math.fsum(map(abs, gradients)) / len(gradients) if gradients else math.nan
        skipped = stepping(self.trainer.optimizer).skipped
        return {"projected_gradient": mean, "skipped_updates": skipped}

    def objective(self, model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Any] | None:
        """Return what evaluates the objective on a batch, or None for the trainer's own loss."""
        chosen = self.config.objective
        if chosen == "loss":
            return None
        function = chosen if callable(chosen) else NAMED[chosen]
        return lambda: function(model, dict(inputs))

    def _start(self, optimizer: ZerothOrderOptimizer, once: Callable[[], float]) -> Engine:
        """Set the mode up, on the first micro-batch: it shows where the model reads."""
        model = self.trainer.model
        layers = tuple(sparse_layers(model).values())
        after = partial(sync_layers, layers) if layers else nothing
        config, trained = self.config, optimizer.trained
        mode: Mode
        if config.mode == "exact":
            mode = ExactMode(model, trained, config.noise, once, after)
        elif config.mode == "inplace":
            mode = InplaceMode(trained, config.noise, after)
        else:
            mode = ReferenceMode(trained, config.eps, after)
        return Engine(config, optimizer, mode, processes(self.trainer.accelerator))

    def _freeze(self, model: nn.Module) -> None:
        """Note what is trained, and let it be alike on all processes and need no gradient."""
        if not self._resumed:
            self._calibrate(model)
        parameters = _trainable(model)
        check_trained(self.trainer, self.config, parameters)
        make_alike(self.trainer.accelerator, model)
        self._parameters = parameters
        for _, parameter in parameters:
            parameter.requires_grad_(False)

    def _calibrate(self, model: nn.Module) -> None:
        """Choose supports that a batch decides, while gradients may still be asked for."""
        trainer, pending = self.trainer, pending_adapters(model)
        ranks = ranks_of(trainer.args) if pending else ONE_RANK
        objective = trainer.sparse_callback.objective
        for name in pending:
            with torch.random.fork_rng():
                calibrate(model, trainer.get_train_dataloader(), name, ranks, objective=objective)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _groups(trainer: Any, parameters: Sequence[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Return torch groups: with weight decay, without it, and those that an adapter asks for."""
    args, tuner = trainer.args, sparse_tuner(trainer.model)
    known = {id(p) for _, p in parameters}
    special = []
    for name in tuner.active_adapters if tuner is not None else ():
        assert tuner is not None
        special += tuner.parameter_groups(name, args.learning_rate)
    special = [g | {"params": [p for p in g["params"] if id(p) in known]} for g in special]
    taken = {id(p) for group in special for p in group["params"]}
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    rest = [(name in decayed, p) for name, p in parameters if id(p) not in taken]
    plain = [
        {"params": [p for with_decay, p in rest if with_decay is wanted], "weight_decay": decay}
        for wanted, decay in ((True, args.weight_decay), (False, 0.0))
    ]
    default = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    return [default | group for group in [*plain, *special] if group["params"]]


def stepping(optimizer: Any) -> ZerothOrderOptimizer:
    """Return our optimizer below accelerate's wrapper.

    Raises:
        ValueError: it is another one, which needs gradients.
    """
    found = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(found, ZerothOrderOptimizer):
        raise ValueError(
            f"optimizers: got a {type(found).__name__}, which needs gradients; leave it out, "
            "zeroth_order.update names the rule"
        )
    return found


def _check_same(optimizer: ZerothOrderOptimizer, made_for: set[int], wanted: set[int]) -> None:
    """Raise ValueError when another part of the model is trained than the time before."""
    if (made_for or {id(t.parameter) for t in optimizer.trained}) != wanted:
        raise ValueError(
            f"model: got {len(wanted)} parameters that require a gradient, other ones than the "
            f"{len(optimizer.trained)} that the optimizer was made for; set trainer.optimizer = "
            "None to begin anew"
        )
