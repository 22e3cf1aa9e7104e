"""The optimizer that a run would make, over a model of fake tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sft.arguments import build_arguments
from sft.identity import sparse_tuner
from sft.kernels.bias_scales import bias_tables
from sft.plan.step import MakeOptimizer
from sft.schema import Recipe
from sft.trainer import method_optimizer

# Tensors of bitsandbytes' optimizers that are smaller keep their state in float32.
SMALL, BLOCK = 4096, 256


def optimizer_maker(recipe: Recipe) -> MakeOptimizer:
    """Return what makes the optimizer of a recipe's run."""
    arguments = build_arguments(recipe.training, recipe.seed)
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    for reference in (False, True):  # kept by the process: they must be real
        bias_tables(betas, reference, torch.device("cpu"))

    def make(model: nn.Module) -> Any:
        tuner = sparse_tuner(model)
        chosen = None if tuner is None else method_optimizer(tuner, arguments)
        trained = [p for p in model.parameters() if p.requires_grad]
        if chosen is None and "8bit" in str(arguments.optim):
            return EightBit(trained, states=1 if "lion" in str(arguments.optim) else 2)
        if chosen is None:
            chosen = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        kind, options = chosen
        return kind(trained, **options)

    return make


class EightBit(torch.optim.Optimizer):
    """Holds what bitsandbytes' optimizers of 8 bits hold, and steps nothing.

    A byte an entry and state, a float32 for each block of 256; small tensors in float32.
    """

    def __init__(self, params: Iterable[Tensor], states: int) -> None:
        super().__init__(params, {})
        self._states = states

    def step(self, closure: Any = None) -> None:
        """Make the state where there is none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self.state[parameter] or dict(self._of(parameter))

    def _of(self, parameter: Tensor) -> Iterable[tuple[str, Tensor]]:
        count = parameter.numel()
        for number in range(1, self._states + 1):
            if count < SMALL:
                yield f"state{number}", torch.empty(count)
            else:
                yield f"state{number}", torch.empty(count, dtype=torch.uint8)
                yield f"absmax{number}", torch.empty(-(-count // BLOCK))
