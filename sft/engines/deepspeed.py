"""DeepSpeed without ZeRO: whole parameters in every process, stepped inside backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sft.adapters.base import SparseTuner
from sft.adapters.ranks import Ranks
from sft.engines.deepspeed_scale import DeepSpeedScale
from sft.engines.deepspeed_settings import check_stepping
from sft.engines.engine import Engine
from sft.engines.masters import is_value
from sft.engines.optimizer_state import OptimizerState, names_of
from sft.engines.plain import PlainEngine


def deepspeed_engine(trainer: Any, ranks: Ranks) -> Engine:
    """Return the engine of a Trainer that DeepSpeed has prepared, at any stage of ZeRO."""
    if trainer.accelerator.state.deepspeed_plugin.zero_stage == 0:
        return DeepSpeedEngine(trainer.model, trainer.optimizer, ranks)
    from sft.engines.zero import ZeroEngine

    return ZeroEngine(trainer.model, trainer.optimizer, ranks)


class DeepSpeedEngine(PlainEngine):
    """ZeRO stage 0: a torch optimizer over whole parameters, which DeepSpeed calls.

    Its step lies inside of backward and leaves no gradients behind.

    Args:
        model: as the Trainer holds it, inside DeepSpeed's engine.
        optimizer: accelerate's wrapper around the torch optimizer.
        ranks: the processes that train together.
    """

    consolidates = True

    def __init__(self, model: nn.Module, optimizer: Any, ranks: Ranks) -> None:
        super().__init__(optimizer, ranks)
        self.name = "deepspeed"
        self._model = model
        self._applied: DeepSpeedScale | None = None

    def check(self, tuner: SparseTuner) -> None:
        """Raise on what steps otherwise than DeepSpeed does."""
        check_stepping(tuner)

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Probe one parameter's gradient in backward, and where it is applied."""
        self._applied = DeepSpeedScale(parameters, self.ranks, self.stock)

    def gradient_scale(self) -> float:
        """Return by how much backward's gradients exceed those applied."""
        return 1.0 if self._applied is None else self._applied.read()

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer's state by parameter name, on the CPU."""
        return OptimizerState(self.stock).gather(names_of(self._model))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of `state`, or of another engine's."""
        kept = {name: tensor for name, tensor in tensors.items() if not is_value(name)}
        OptimizerState(self.stock).scatter(names_of(self._model), kept)

    def close(self) -> None:
        """Stop listening to backward."""
        if self._applied is not None:
            self._applied.close()
        self._applied = None
        super().close()
