"""The optimizer that a run would make, over a model of fake tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from sft.identity import sparse_tuner
from sft.optim.adamw import SparseAdamW
from sft.plan.step import MakeOptimizer
from sft.recipe.arguments import build_arguments
from sft.recipe.schema import Recipe
from sft.trainer import method_optimizer

# Tensors of bitsandbytes' optimizers that are smaller keep their state in float32.
SMALL, BLOCK = 4096, 256


def optimizer_maker(recipe: Recipe) -> MakeOptimizer:
    """Return what makes the optimizer of a recipe's run."""
    arguments = build_arguments(recipe)

    def make(model: nn.Module) -> Any:
        tuner = sparse_tuner(model)
        chosen = None if tuner is None else method_optimizer(tuner, arguments)
        trained = [p for p in model.parameters() if p.requires_grad]
        name = OptimizerNames(arguments.optim).value  # "adamw_bnb_8bit" is the member ADAMW_BNB
        if chosen is None and "8bit" in name:
            return EightBit(trained, states=1 if "lion" in name else 2)
        if chosen is None:
            chosen = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        kind, options = chosen
        return Aged(trained) if kind is SparseAdamW else kind(trained, **options)

    return make


class Aged(torch.optim.Optimizer):
    """Holds what SparseAdamW holds, and reads and writes as much.

    It goes over entries in so small parts that none of its temporaries counts; each of them would
    take as long here as a whole tensor.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state where there is none, and go over it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    for key in SparseAdamW.per_entry:
                        dtype = torch.int32 if key == "age" else torch.float32
                        state[key] = torch.empty(parameter.shape, dtype=dtype)
                state["age"].add_(1)
                state["exp_avg"].lerp_(parameter.grad.float(), 0.1)
                state["exp_avg_sq"].mul_(0.9)
                parameter.add_(state["exp_avg"])


class EightBit(torch.optim.Optimizer):
    """Holds what bitsandbytes' optimizers of 8 bits hold, and steps nothing.

    A byte an entry and state, a float32 for each block of 256; small tensors in float32.
    """

    def __init__(self, params: Iterable[Tensor], states: int) -> None:
        super().__init__(params, {})
        self._states = states

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
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
