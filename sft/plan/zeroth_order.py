"""The bytes of a zeroth-order step: one forward pass, and what displaced weights take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sft.optim.zeroth_order.ahead import BYTES
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.rules import STATEFUL
from sft.optim.zeroth_order.scratch import size_of
from sft.plan.losses import planned_loss
from sft.plan.step import Run, apart, name_held, noting
from sft.plan.timeline import TRANSIENTS, Timeline

# Buffers of noise that a thread keeps: three of 2 MiB, and the words of modules to come.
NOISE = 3 * 2**21 + BYTES


def run_zeroth_order(model: nn.Module, config: ZerothOrderConfig, run: Run) -> Timeline:
    """Return the timeline of a forward pass at displaced weights.

    Args:
        model: on the meta device; fake tensors take the place of its own.
        config: of the run.
        run: the step.
    """

    def note() -> Timeline:
        with noting(model, run) as ledger:
            moved = [torch.empty(NOISE, dtype=torch.uint8), *_displaced(model, config.mode)]
            trained = [p for p in model.parameters() if p.requires_grad]
            rule = STATEFUL.get(config.update, ())
            states = [torch.empty(p.shape) for p in trained for _ in rule]
            name_held(ledger, model, states)
            ledger.mark(TRANSIENTS, moved)
            timeline, begin = ledger.timeline, ledger.clock
            timeline.phases.append(("forward", begin))
            with torch.no_grad():
                planned_loss(model, run.batch, run.half)
            timeline.phases.append(("", ledger.clock + 1))
            timeline.keep_from(begin)
        # of each query both sides are evaluated, and weights are written in between
        sides = config.queries * (1 if config.estimator == "one_side" else 2)
        timeline.work *= sides
        return timeline

    return apart(note)


def _displaced(model: nn.Module, mode: str) -> list[Tensor]:
    """Return what stands in for displaced weights, as `ExactMode` makes it.

    A scratch as large as the trained weights of one module, and copies of those in containers.
    Of an embedding single rows are made.
    """
    if mode != "exact":
        return []
    largest, copies = 0, list[Tensor]()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if isinstance(module, nn.ParameterDict):
            copies += [torch.empty_like(p) for p in own]
        elif not isinstance(module, nn.Embedding):
            largest = max(largest, sum(map(size_of, own)))
    return [torch.empty(largest, dtype=torch.uint8), *copies]
