"""The permuted layout: while an adapter is resident, its units lie side by side in the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sft.adapters.config import require
from sft.adapters.layer import sparse_layers
from sft.adapters.structure.layout import unwrapped
from sft.adapters.structure.permute import front_order, inverse
from sft.adapters.structure.reorder import reorder_

if TYPE_CHECKING:
    from sft.adapters.slices.layer import SliceLinear
    from sft.adapters.slices.units import Slot, UnitGroup
    from sft.adapters.structure.groups import CoupledGroup


@dataclass(frozen=True, eq=False)
class Order:
    """The order of the units of one group, chosen ones in front.

    Args:
        group: whose units.
        order: (units,), unit order[i] comes to place i.
        places: by module, (features,) where each feature of the trained side comes to lie.
    """

    group: CoupledGroup
    order: Tensor
    places: dict[str, Tensor]


class PermutedUnits:
    """Reorders a model for its resident adapter, and back before anyone reads the base.

    The order changes between forward passes only: the matrices of a group must agree in each. The
    model is in its own order whenever a state dict is read or loaded, a weight merged, an adapter
    switched or moved, and outside resident mode; so files and exports are in it too.

    Args:
        model: the base model, in which adapters will be injected.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._groups: dict[str, Sequence[UnitGroup]] = {}
        self._active: str | None = None
        self._orders: list[Order] = []
        self._places: dict[str, Tensor] = {}
        self._paused = False
        self._handles: list[RemovableHandle] = []

    def add(self, adapter: str, groups: Sequence[UnitGroup]) -> None:
        """Let an adapter's units in these groups lie side by side while it is resident."""
        self.restore()
        self._groups[adapter] = groups
        if groups and not self._handles:
            model = self._model
            self._handles = [
                model.register_forward_pre_hook(self._before_forward),
                model.register_state_dict_pre_hook(self._before_state),  # type: ignore[no-untyped-call]
                model.register_load_state_dict_pre_hook(self._before_state),  # type: ignore[no-untyped-call]
            ]

    def check(self, groups: Sequence[UnitGroup], features: Mapping[str, Tensor]) -> None:
        """Raise if these features of each module cannot be brought side by side.

        Raises:
            ValueError: a group or its weights do not allow it.
        """
        for order in orders_of(groups, features):
            for member in order.group.members:
                module = unwrapped(self._model.get_submodule(member.module))
                tensor = None if member.listed else getattr(module, member.parameter)
                floats = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
                require(
                    "layout",
                    "permuted",
                    tensor is None or (floats and type(tensor) is nn.Parameter),
                    f"'index', as {member.module!r} is quantised or sharded; set layout='index'",
                )

    def close(self) -> None:
        """Bring the model back to its own order for good."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles, self._groups = [], {}

    def places(self, adapter: str, module: str) -> Tensor | None:
        """Return where a module's features lie now, (features,); None if in their own order."""
        return self._places.get(module) if self._active == adapter else None

    def restore(self) -> None:
        """Bring the model back to its own order, bit for bit."""
        if self._active is None:
            return
        orders = self._orders
        self._release()
        self._active, self._orders, self._places = None, [], {}
        for order in orders:
            reorder_(self._model, order.group, inverse(order.order))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the model in its own order for the block: other adapters take part in it."""
        self.restore()
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _before_forward(self, *_: Any) -> None:
        wanted = self._wanted()
        if wanted == self._active:
            return
        self.restore()
        if wanted is None:
            return
        groups = self._groups[wanted]
        modules = {slot.module for group in groups for slot in group.slots}
        layers = {path: cast("SliceLinear", self._model.get_submodule(path)) for path in modules}
        orders = orders_of(groups, {path: layer.support(wanted) for path, layer in layers.items()})
        self._release()
        for order in orders:
            reorder_(self._model, order.group, order.order)
        self._active, self._orders = wanted, orders
        self._places = {path: to for order in orders for path, to in order.places.items()}

    def _before_state(self, *_: Any) -> None:
        self.restore()

    def _release(self) -> None:
        for layer in sparse_layers(self._model).values():
            layer._residency.restore()

    def _wanted(self) -> str | None:
        """Return the adapter that the layers are to hold, if it is one of ours."""
        if self._paused or not any(self._groups.values()):
            return None
        layers = cast("list[SliceLinear]", list(sparse_layers(self._model).values()))
        found = {name for layer in layers if (name := layer.held()) is not None}
        name = found.pop() if len(found) == 1 else None
        return name if name is not None and self._groups.get(name) else None


def orders_of(groups: Sequence[UnitGroup], features: Mapping[str, Tensor]) -> list[Order]:
    """Return the orders that bring the trained units of each group to its front.

    Args:
        groups: with the coupled groups they belong to.
        features: by module, (s,) what is trained there.

    Raises:
        ValueError: a coupling allows none.
    """
    orders = []
    for group in groups:
        chosen = torch.zeros(group.num_units, dtype=torch.bool)
        for slot in group.slots:
            trained = torch.isin(slot.table, features[slot.module].cpu().long()).all(dim=1)
            chosen |= trained.repeat_interleave(slot.shared)
        if group.coupled is not None and bool(chosen.any()):
            orders.append(order_units(group.coupled, chosen.nonzero().flatten(), group.slots))
    return orders


def order_units(group: CoupledGroup, units: Tensor, slots: Sequence[Slot]) -> Order:
    """Return the order that brings these units of a group to the front.

    Raises:
        ValueError: the coupling allows none.
    """
    require(
        "layout",
        "permuted",
        group.permutable,
        f"'index' here: {group.reason}; set layout='index'",
    )
    order = front_order(group, units)
    places: dict[str, Tensor] = {}
    trained = {(slot.module, slot.role) for slot in slots}
    for member in (*group.producers, *group.consumers):
        if (member.module, member.role) in trained:
            place = places.setdefault(member.module, torch.arange(member.extent))
            home = member.positions(torch.arange(group.num_units))
            place[member.positions(order)] = home
    return Order(group, order, places)
