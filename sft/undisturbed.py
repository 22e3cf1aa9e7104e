"""Evaluate a loss and leave nothing behind but its value: no gradient, no count, no draw."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sft.randomness import own_randomness

# what TRL's trainers count while they compute a loss; a second evaluation must not count again
COUNTERS = ("_metrics", "_total_train_tokens", "_logs")
HALF = (torch.float16, torch.bfloat16)


@contextmanager
def undisturbed(trainer: Any, seed: int, *, dropout: bool, count: bool) -> Iterator[None]:
    """Let a trainer evaluate its model in the block, as in every other block of the same seed.

    Args:
        trainer: a transformers Trainer.
        seed: of whatever the model draws.
        dropout: leave dropout on, with the masks of the seed.
        count: let the trainer count the evaluation in what it logs.
    """
    model = trainer.model
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(own_randomness(seed))
        stack.enter_context(nullcontext() if dropout else _evaluating(model))
        stack.enter_context(nullcontext() if count else uncounted(trainer))
        if any(p.dtype in HALF for p in model.parameters()):
            stack.enter_context(FullPrecisionLosses())
        yield


@contextmanager
def uncounted(trainer: Any) -> Iterator[None]:
    """Leave a trainer's own counters and logs as they were."""
    kept = {key: copy.deepcopy(vars(trainer)[key]) for key in COUNTERS if key in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; the model itself still says that it trains, except while it runs."""
    switched = [m for m in model.modules() if m is not model and m.training]
    for module in switched:
        module.training = False

    def enter(*_: Any) -> None:
        model.training = False

    def leave(*_: Any) -> None:
        model.training = trains

    trains = model.training
    handles = (
        model.register_forward_pre_hook(enter),
        model.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.training = trains
        for module in switched:
            module.training = True


class FullPrecisionLosses(TorchFunctionMode):
    """Takes a loss of half-precision logits in fp32: in bf16 it has steps of 0.004."""

    LOSSES = frozenset(
        {getattr(functional, name) for name in dir(functional) if name.endswith("_loss")}
        | {functional.cross_entropy, functional.kl_div, functional.log_softmax}
        | {functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.LOSSES:
            args = tuple(_widened(value) for value in args)
            kwargs = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
