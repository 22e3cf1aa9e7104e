"""Run a training step of a model without content, and note what it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sft.adapters.resident import enter_resident, leave_resident, sync_resident
from sft.plan.batch import Batch
from sft.plan.flops import flops
from sft.plan.ledger import Ledger
from sft.plan.losses import planned_loss
from sft.plan.scratch import scratch
from sft.plan.shapes import faking, place
from sft.plan.timeline import (
    ACTIVATIONS,
    GRADIENTS,
    INDICES,
    OPTIMIZER,
    ORIGINALS,
    TRAINED,
    TRANSIENTS,
    WEIGHTS,
    Timeline,
)

T = TypeVar("T")
MakeOptimizer = Callable[[nn.Module], Any]


def apart(run: Callable[[], T]) -> T:
    """Run in a thread of its own: buffers that kernels keep by thread end with it."""
    found: list[T] = []
    failed: list[BaseException] = []

    def target() -> None:
        try:
            found.append(run())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


@dataclass(frozen=True)
class Run:
    """What a step is made of.

    Args:
        batch: of each micro-batch.
        max_norm: gradients are clipped by norm; 0 for not at all.
        micro_batches: of the step.
        half: what autocast computes in, None without.
        packed: bytes of quantised weights, by the name of the parameter.
        unpacked: bytes of an entry of theirs in a product.
        aside: weights are not written to.
    """

    batch: Batch
    max_norm: float = 0.0
    micro_batches: int = 1
    half: torch.dtype | None = None
    packed: Mapping[str, int] = field(default_factory=dict)
    unpacked: int = 4
    aside: bool = False


def run_step(model: nn.Module, make_optimizer: MakeOptimizer, run: Run) -> Timeline:
    """Return the timeline of a step in the middle of a run.

    Args:
        model: on the meta device; fake tensors take the place of its own.
        make_optimizer: returns the optimizer of a model.
        run: the step.
    """

    def note() -> Timeline:
        with noting(model, run) as ledger:
            optimizer = make_optimizer(model)
            _prepare(model, optimizer)
            states = [t for state in optimizer.state.values() for t in state.values()]
            name_held(ledger, model, [t for t in states if isinstance(t, Tensor)])
            _step(ledger, model, optimizer, run)
        return ledger.timeline

    return apart(note)


@contextmanager
def noting(model: nn.Module, run: Run) -> Iterator[Ledger]:
    """Place a model, ready to train, and note what the block does with it."""
    ledger = Ledger(scratch, flops)
    with faking(), ledger:
        place(model)
        for name, parameter in model.named_parameters():
            if name in run.packed:
                ledger.pack(parameter, run.packed[name], run.unpacked * parameter.numel())
        copied = model.parameters() if run.batch.reference == "copy" else ()
        reference = [torch.empty_like(parameter) for parameter in copied]
        ledger.mark(WEIGHTS, reference)
        model.train()
        if not run.aside:
            enter_resident(model)
        yield ledger
        leave_resident(model)


def _prepare(model: nn.Module, optimizer: Any) -> None:
    """Make what a first step makes: optimizer state."""
    trained = _trained(model)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sync_resident(model)


def name_held(ledger: Ledger, model: nn.Module, states: Sequence[Tensor]) -> None:
    """Say what everything that lives between steps is for."""
    for piece in ledger.alive():
        if piece.kind != WEIGHTS:
            piece.kind = ORIGINALS if piece.floating else INDICES
    ledger.mark(WEIGHTS, [b for b in model.buffers() if b.is_floating_point()])
    ledger.mark(WEIGHTS, [p for p in model.parameters() if not p.requires_grad])
    ledger.mark(TRAINED, _trained(model))
    ledger.mark(OPTIMIZER, states)


def _step(ledger: Ledger, model: nn.Module, optimizer: Any, run: Run) -> None:
    """Run forward, backward, optimizer, and mark their beginnings."""
    timeline, trained = ledger.timeline, _trained(model)
    begin = ledger.clock
    # from the second on, gradients of those before are there: the others are like it
    for number in range(min(2, run.micro_batches)):
        start, suffix = ledger.clock, f" {number + 1}" if run.micro_batches > 1 else ""
        timeline.phases.append((f"forward{suffix}", start))
        loss = planned_loss(model, run.batch, run.half)
        for piece in ledger.alive():
            if piece.born > start and piece.kind == TRANSIENTS:
                piece.kind = ACTIVATIONS
        middle = ledger.clock
        timeline.phases.append((f"backward{suffix}", middle))
        ledger.backward = True
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.backward = False
        del loss
        ledger.join_sums()
        # from one half to the other, gradients take the place of activations
        timeline.phases.append((f"end of backward{suffix}", (middle + ledger.clock) // 2))
        ledger.mark(GRADIENTS, [p.grad for p in trained if p.grad is not None])
    again = [work for work in timeline.work if work.clock > start]
    timeline.phases.append(("optimizer", ledger.clock))
    if run.max_norm:
        torch.nn.utils.clip_grad_norm_(trained, run.max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sync_resident(model)
    timeline.phases.append(("", ledger.clock + 1))
    timeline.keep_from(begin)
    timeline.work += again * max(0, run.micro_batches - 2)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
