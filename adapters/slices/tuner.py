"""The tuner of methods that train slices: targets by units, placement, order of the units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from sft.adapters.base import SparseTuner
from sft.adapters.gathered import gathered, is_away
from sft.adapters.geometry import Kind, layer_kind, stored_weight
from sft.adapters.layer import SparseLayer
from sft.adapters.shapes import on_meta
from sft.adapters.slices.experts import SliceExperts, expert_columns
from sft.adapters.slices.layer import SliceLinear
from sft.adapters.slices.permuted import PermutedUnits
from sft.adapters.slices.units import UnitGroup
from sft.adapters.structure.layout import unwrapped

Chosen = tuple[dict[str, Tensor], bool]


class SliceTuner(SparseTuner):
    """A PEFT tuner whose layers train whole input or output features.

    A method derives from it, and provides `find` and `choose`.
    """

    prefix = "s2ft_"
    tuner_layer_cls = SliceLinear
    kinds = (Kind.LINEAR, Kind.CONV1D, Kind.EXPERTS)

    def find(self, config: Any, model: nn.Module) -> list[UnitGroup]:
        """Return the groups of units to choose from.

        Raises:
            ValueError: there are none, or the configuration does not fit them.
        """
        raise NotImplementedError

    def choose(self, groups: list[UnitGroup], config: Any, *, on_meta: bool) -> Chosen:
        """Return the features of each module, and whether they are a placeholder.

        Raises:
            ValueError: the budget or the selection does not fit the groups.
        """
        raise NotImplementedError

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Find the units of the model, wrap the matrices of the roles, choose units of each.

        Raises:
            ValueError: the model has no such units, or the budget, the selection or the layout do
                not fit it.
        """
        if "permuted" not in vars(self):
            self.permuted = PermutedUnits(model)
            self.groups: dict[str, Sequence[UnitGroup]] = {}
        self.permuted.restore()
        config = self.peft_config[adapter_name]
        # whatever is refused is refused before a module is wrapped
        groups = self.find(config, model)
        _check_sides(model, groups)
        self._chosen = self.choose(groups, config, on_meta=on_meta(kwargs))
        self._sides = {slot.module: slot.side for group in groups for slot in group.slots}
        self.set_groups(adapter_name, groups, moved=config.layout == "permuted")
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Any) -> PeftConfig:
        return peft_config

    def takes(self, name: str) -> bool:
        """Take what was found: PEFT matches suffixes, which names in other parts may end with."""
        return name in self._sides

    def new_layer(self, config: Any, target: nn.Module, name: str) -> SparseLayer:
        """Return a layer around a matrix whose input or output features are trained."""
        if layer_kind(unwrapped(target)) is Kind.EXPERTS:
            return SliceExperts(target, name=name, permuted=self.permuted)
        return SliceLinear(target, side=self._sides[name], name=name, permuted=self.permuted)

    def attach(
        self, adapter: str, config: Any, targets: dict[str, SparseLayer], *, on_meta: bool
    ) -> None:
        """Give each layer the adapter with the features that were chosen for it."""
        chosen, pending = self._chosen
        for name, layer in targets.items():
            assert isinstance(layer, SliceLinear)
            features = chosen[name].to("meta") if on_meta else chosen[name]
            if pending:
                layer.pending.add(adapter)
            layer.add_adapter(
                adapter,
                features,
                saved_inputs=config.saved_inputs,
                inference_mode=config.inference_mode,
            )
            if not config.init_weights and not on_meta:
                values = layer.s2ft_values[adapter]
                values.data = torch.randn_like(values)

    def set_groups(self, adapter: str, groups: Sequence[UnitGroup], *, moved: bool) -> None:
        """Remember what an adapter chooses from, and whether its units are brought side by side."""
        self.groups[adapter] = groups
        self.permuted.add(adapter, groups if moved else [])

    def read(self, module: str) -> Tensor:
        """Return the (out, in) pre-trained weight of a module."""
        layer = self.model.get_submodule(module)
        base = unwrapped(layer)
        if isinstance(layer, SparseLayer):
            weight = layer.pretrained_weight()
        elif layer_kind(base) is Kind.EXPERTS:
            weight = expert_columns(base)
        else:
            with gathered([stored_weight(base)]):
                weight = dequantize_module_weight(base)
                weight = weight.clone() if is_away(weight) else weight
        return weight.detach().t() if layer_kind(base) is Kind.CONV1D else weight.detach()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is None:
            yield
            return
        with self.permuted.paused(), super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.permuted.close()
        return super()._unload_and_optionally_merge(*args, **kwargs)


def _check_sides(model: nn.Module, groups: Sequence[UnitGroup]) -> None:
    """Raise if an adapter that is there trains the other side of a matrix."""
    for slot in (slot for group in groups for slot in group.slots):
        layer = model.get_submodule(slot.module)
        if isinstance(layer, SliceLinear) and layer.side != slot.side:
            words = {"in": "input", "out": "output"}
            raise ValueError(
                f"roles: got {slot.role!r}, which trains {words[slot.side]} features of "
                f"{slot.module!r}, where another adapter trains {words[layer.side]} features; "
                "leave the module out, or use a model of its own"
            )
