"""FSDP2: parameters, gradients and optimizer state of which every process holds some rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sft.adapters.base import SparseTuner
from sft.adapters.dynamics import Penalty, SupportChange
from sft.adapters.gathered import Gathering
from sft.adapters.ranks import Ranks
from sft.engines.engine import Removable
from sft.engines.optimizer_state import OptimizerState, names_of
from sft.engines.shard_scale import ShardScale
from sft.optim.move import move_state
from sft.optim.prox import attach
from sft.optim.shards import is_sharded, put_, whole

Holder = tuple[nn.Module, str]


class FsdpEngine:
    """The engine of a Trainer whose model went through `fully_shard`.

    The base is sharded, so that every layer runs aside. Trained values are sharded with it, by
    rows, and so is the optimizer's state; where a support changes they are whole for the moment.

    Args:
        model: sharded.
        optimizer: the Trainer's, wrapped by accelerate.
        ranks: the processes that train together.
    """

    name = "fsdp"
    consolidates = True

    def __init__(self, model: nn.Module, optimizer: Any, ranks: Ranks) -> None:
        self.ranks = ranks
        self._model = model
        self._sharding = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._places = _places(model)
        self._optimizer = optimizer
        self._scale: ShardScale | None = None
        self._stand_ins: dict[int, nn.Parameter] = {}
        self._gathering = Gathering(self.whole)

    @property
    def stock(self) -> Any:
        """The torch optimizer that steps, without accelerate's wrapper."""
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def check(self, tuner: SparseTuner) -> None:
        """Raise on what shards can't follow; `check_fsdp` has seen to the rest."""
        if type(self.stock).__module__.startswith("bitsandbytes"):
            raise ValueError(
                f"optim: got {type(self.stock).__name__} under FSDP, whose shards it can't step; "
                "set optim=adamw_torch"
            )

    def check_staged(self) -> None:
        """The optimizer is torch's: it can always begin anew."""

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Probe one entry of the gradient where it is reduced, and where it is applied."""
        self._scale = ShardScale([p for p in parameters if is_sharded(p)], self.ranks)

    def gradient_scale(self) -> float:
        """Return by how much backward's gradients exceed those applied; 0 for a skipped update."""
        found = 1.0 if self._scale is None else self._scale.read()
        return 0.0 if getattr(self._optimizer, "step_was_skipped", False) else found

    def publish(self, parameters: Iterable[nn.Parameter]) -> None:
        """The next forward pass gathers the shards: what it left gathered is given up."""
        self._reshard()

    def move(self, change: SupportChange) -> None:
        """Move the optimizer's state of a parameter by index, whole for the moment."""
        parameter = self._stand_ins.get(id(change.parameter), change.parameter)
        with OptimizerState(self.stock).whole(parameter):
            move_state(
                self.stock,
                parameter,
                change.source,
                dim=change.dim,
                mean_grad=change.mean_grad,
                mean_square=change.mean_square,
                updates=change.updates,
            )

    def begin_anew(self) -> None:
        """Drop the optimizer's state."""
        self.stock.state.clear()

    def accumulators(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        """Return SM3's accumulators: every process has them whole."""
        parameter = self._stand_ins.get(id(parameter), parameter)
        found: tuple[Tensor, Tensor] | None = self.stock.accumulators(parameter)
        return found

    def keeps_accumulators(self) -> bool:
        """Tell whether the optimizer is SM3."""
        return hasattr(self.stock, "accumulators")

    def shrink(self, penalties: list[Penalty]) -> Removable:
        """Shrink each process's share in the optimizer's step."""
        return attach(self.stock, penalties)

    @contextmanager
    def whole(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Put whole parameters in the place of sharded ones, and keep what is written to them."""
        self._reshard()
        holders = self._holders(parameters)
        placed = [(sharded, _stand_in(sharded), where) for sharded, where in holders]
        for sharded, stand_in, where in placed:
            self._stand_ins[id(stand_in)] = sharded
            _place(where, stand_in)
        try:
            yield
        finally:
            for sharded, stand_in, where in placed:
                del self._stand_ins[id(stand_in)]
                _place(where, sharded)
        for sharded, stand_in, _ in placed:
            put_(sharded, stand_in.detach())

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer's state by parameter name, whole, on the CPU."""
        self._reshard()
        return OptimizerState(self.stock).gather(names_of(self._model))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take each process's share of the tensors of `state`."""
        self._reshard()
        OptimizerState(self.stock).scatter(names_of(self._model), tensors)

    def groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each group of the optimizer."""
        return [list(group["params"]) for group in self.stock.param_groups]

    def close(self) -> None:
        """Stop listening to backward."""
        if self._scale is not None:
            self._scale.close()
        self._scale = None
        self._gathering.remove()

    def _reshard(self) -> None:
        """Give up what a forward pass without backward left gathered: it may be out of date."""
        for module in self._sharding:
            module.reshard()

    def _holders(self, parameters: Iterable[Tensor]) -> list[tuple[Any, list[Holder]]]:
        """Return the sharded ones among parameters, and the modules that hold them."""
        wanted = {id(p): p for p in parameters if is_sharded(p)}
        return [(sharded, self._places[key]) for key, sharded in wanted.items()]


def _places(model: nn.Module) -> dict[int, list[Holder]]:
    """Return by identity the modules that hold each parameter: of shards, for all of a run."""
    found: dict[int, list[Holder]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, attribute))
    return found


def _stand_in(sharded: Any) -> nn.Parameter:
    return nn.Parameter(whole(sharded).clone(), requires_grad=sharded.requires_grad)


def _place(where: Sequence[Holder], parameter: Any) -> None:
    # past setters: as FSDP itself swaps them
    for module, attribute in where:
        module._parameters[attribute] = parameter
