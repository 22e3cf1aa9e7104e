"""DeepSpeed's ZeRO 1 to 3: optimizer state, gradients, then parameters in parts, stepped flat."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from sft.adapters.base import SparseTuner
from sft.adapters.dynamics import Penalty, SupportChange
from sft.adapters.gathered import gathered
from sft.adapters.ranks import Ranks
from sft.engines.deepspeed_scale import DeepSpeedScale
from sft.engines.deepspeed_settings import check_sharded
from sft.engines.engine import Removable
from sft.engines.masters import is_value, value_key
from sft.engines.optimizer_state import OptimizerState, names_of
from sft.engines.zero_prox import ZeroShrinking
from sft.engines.zero_shards import ZeroShards, trained
from sft.engines.zero_whole import WholeOptimizer
from sft.optim.move import move_state, moved


class ZeroEngine:
    """The engine of a Trainer whose model DeepSpeed prepared with ZeRO 1, 2 or 3.

    Trained parameters have an fp32 master in a flat vector, of which each process updates a part,
    and a copy that forward reads; both are written where a support changes. Stages 1 and 2 leave
    the weights whole, so that layers are resident. Stage 3 partitions them: layers run aside.

    Args:
        model: as the Trainer holds it, inside DeepSpeed's engine.
        optimizer: accelerate's wrapper around DeepSpeed's.
        ranks: the processes that train together.
    """

    name = "deepspeed"
    consolidates = True

    def __init__(self, model: nn.Module, optimizer: Any, ranks: Ranks) -> None:
        self.ranks = ranks
        self._model = model
        self._optimizer = optimizer
        self._shards = ZeroShards(optimizer.optimizer)
        self._scale: DeepSpeedScale | None = None

    @property
    def stock(self) -> Any:
        """The torch optimizer, which steps flat vectors."""
        return self._shards.stock

    def check(self, tuner: SparseTuner) -> None:
        """Raise on what needs parameters of its own shape in the optimizer's step."""
        check_sharded(tuner, self.stock)

    def check_staged(self) -> None:
        """The optimizer is torch's: it can always begin anew."""

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Probe one parameter's gradient in backward, and where it is applied."""
        self._scale = DeepSpeedScale(parameters, self.ranks, self.stock, self._shards.fragment)

    def gradient_scale(self) -> float:
        """Return by how much backward's gradients exceed those applied; 0 for a skipped update."""
        found = 1.0 if self._scale is None else self._scale.read()
        return 0.0 if self._optimizer.step_was_skipped else found

    def publish(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let the masters be what was written to the parameters."""
        for parameter in parameters:
            self._shards.adopt(parameter)

    def move(self, change: SupportChange) -> None:
        """Move masters and the optimizer's state of a parameter by index."""
        parameter = change.parameter
        whole = WholeOptimizer(self._shards, [parameter])
        stand_in = whole.stand_ins[id(parameter)]
        move_state(
            whole.optimizer,
            stand_in,
            change.source,
            dim=change.dim,
            mean_grad=change.mean_grad,
            mean_square=change.mean_square,
            updates=change.updates,
        )
        whole.put_back()
        # of the master: what forward reads may have fewer bits
        self._shards.put_value(parameter, moved(stand_in, change.source, dim=change.dim))

    def begin_anew(self) -> None:
        """Let the optimizer's state be as before its first step, in place: DeepSpeed holds on."""
        for state in self.stock.state.values():
            for key, value in state.items():
                state[key] = value.zero_() if isinstance(value, Tensor) else type(value)(0)

    def accumulators(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        """Return None: flat vectors have no rows."""
        return None

    def keeps_accumulators(self) -> bool:
        """SM3 has no rows and columns in a flat vector."""
        return False

    def shrink(self, penalties: list[Penalty]) -> Removable:
        """Shrink each process's part of the masters, before they are handed to forward."""
        return ZeroShrinking(self.stock, penalties, self._shards)

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Gather what stage 3 partitions; what is written stays in what forward reads."""
        return gathered(parameters)

    def state(self) -> dict[str, Tensor]:
        """Return optimizer state and masters by parameter name, whole, on the CPU."""
        names = names_of(self._model)
        whole = WholeOptimizer(self._shards, device="cpu")
        found = OptimizerState(whole.optimizer).gather(whole.names(names))
        return found | {
            value_key(names[key]): stand_in for key, stand_in in whole.stand_ins.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take each process's part of the tensors of `state`, or of another engine's."""
        names = names_of(self._model)
        self.load_values(tensors)
        self._shards.make_states()
        whole = WholeOptimizer(self._shards, device="cpu")
        kept = {name: tensor for name, tensor in tensors.items() if not is_value(name)}
        OptimizerState(whole.optimizer).scatter(whole.names(names), kept)
        whole.put_back()

    def load_values(self, tensors: dict[str, Tensor]) -> None:
        """Take the masters of `state`, where it has them."""
        names = names_of(self._model)
        for parameter in trained(self._shards):
            value = tensors.get(value_key(names[id(parameter)]))
            if value is not None:
                self._shards.put_value(parameter, value)

    def values(self) -> dict[str, Tensor]:
        """Return the masters by parameter name, whole, on the CPU."""
        names = names_of(self._model)
        return {names[id(p)]: self._shards.value(p).cpu() for p in trained(self._shards)}

    def groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each group of the optimizer, which itself has flat vectors."""
        return [parameters for _, parameters in self._shards.groups]

    def close(self) -> None:
        """Stop listening to backward."""
        if self._scale is not None:
            self._scale.close()
        self._scale = None
