"""Run a training step of a model without content, and note what it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sft.adapters.resident import enter_resident, leave_resident, sync_resident
from sft.plan.batch import Batch
from sft.plan.flops import flops
from sft.plan.ledger import Ledger
from sft.plan.losses import labelled_nll
from sft.plan.scratch import scratch
from sft.plan.shapes import faking, place
from sft.plan.timeline import (
    ACTIVATIONS,
    GRADIENTS,
    INDICES,
    NEVER,
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


def run_step(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    batch: Batch,
    *,
    max_norm: float = 0.0,
    micro_batches: int = 1,
    resident: bool = True,
) -> Timeline:
    """Return the timeline of a step in the middle of a run.

    Args:
        model: on the meta device; fake tensors take the place of its own.
        make_optimizer: returns the optimizer of a model.
        batch: of each micro-batch.
        max_norm: gradients are clipped by norm; 0 for not at all.
        micro_batches: of the step.
        resident: weights may hold what is trained.
    """

    def run() -> Timeline:
        ledger = Ledger(scratch, flops)
        with faking(), ledger:
            place(model)
            model.train()
            if resident:
                enter_resident(model)
            optimizer = make_optimizer(model)
            _prepare(model, optimizer)
            _name(ledger, model, optimizer)
            _step(ledger, model, optimizer, batch, max_norm, micro_batches)
            timeline = ledger.timeline
            leave_resident(model)
        return timeline

    return apart(run)


def _prepare(model: nn.Module, optimizer: Any) -> None:
    """Make what a first step makes: optimizer state."""
    trained = _trained(model)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sync_resident(model)


def _name(ledger: Ledger, model: nn.Module, optimizer: Any) -> None:
    """Say what everything that lives between steps is for."""
    for piece in ledger.alive():
        piece.kind = ORIGINALS if piece.floating else INDICES
    ledger.mark(WEIGHTS, [b for b in model.buffers() if b.is_floating_point()])
    ledger.mark(WEIGHTS, [p for p in model.parameters() if not p.requires_grad])
    ledger.mark(TRAINED, _trained(model))
    states = [t for state in optimizer.state.values() for t in state.values()]
    ledger.mark(OPTIMIZER, [t for t in states if isinstance(t, Tensor)])


def _step(
    ledger: Ledger,
    model: nn.Module,
    optimizer: Any,
    batch: Batch,
    max_norm: float,
    micro_batches: int,
) -> None:
    """Run forward, backward, optimizer, and mark their beginnings."""
    timeline, trained = ledger.timeline, _trained(model)
    begin = ledger.clock
    for _ in range(micro_batches):
        start = ledger.clock
        timeline.phases.append(("forward", start))
        loss = labelled_nll(model, batch)
        for piece in ledger.alive():
            if piece.born > start and piece.kind == TRANSIENTS:
                piece.kind = ACTIVATIONS
        middle = ledger.clock
        timeline.phases.append(("backward", middle))
        loss.backward()
        del loss
        # from one half to the other, gradients take the place of activations
        timeline.phases.append(("end of backward", (middle + ledger.clock) // 2))
        ledger.mark(GRADIENTS, [p.grad for p in trained if p.grad is not None])
    timeline.phases.append(("optimizer", ledger.clock))
    if max_norm:
        torch.nn.utils.clip_grad_norm_(trained, max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sync_resident(model)
    timeline.phases.append(("", ledger.clock + 1))
    for piece in timeline.pieces:
        if piece.born > begin and piece.died == NEVER:
            # views of a pattern are made once, and stay
            piece.born, piece.kind = begin, INDICES if not piece.floating else ORIGINALS
    timeline.work = [work for work in timeline.work if work.clock > begin]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


