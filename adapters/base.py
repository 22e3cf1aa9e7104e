"""The PEFT plumbing that every sparse method shares."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from sft.adapters.budget import allocate, allocate_reference
from sft.adapters.config import SparseConfig
from sft.adapters.delta_layer import DeltaLayer, DeltaLinear
from sft.adapters.dynamics import Dynamics
from sft.adapters.geometry import Kind, layer_kind
from sft.adapters.loading import check_adapter_file
from sft.adapters.select import Candidates, seeded, strategy


class DeltaTuner(BaseTuner):  # type: ignore[misc]
    """A PEFT tuner whose layers train deltas at a support.

    A method derives from it, names its `prefix`, and may override `dynamics`.
    """

    prefix = "delta_"
    tuner_layer_cls = DeltaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name and shape

    # -- injection ---------------------------------------------------------------------------

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Wrap the targets, share the budget out over them, and choose each support.

        Raises:
            ValueError: a target can't be adapted, shares its weight, or gets no weight to train.
        """
        self._targets: dict[str, DeltaLayer] = {}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        low_memory = kwargs.get("low_cpu_mem_usage", False)
        counts = self._allocate(config, model)
        for name, layer in self._targets.items():
            _attach(layer, name, adapter_name, config, counts[name], on_meta=low_memory)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _allocate(self, config: SparseConfig, model: nn.Module) -> dict[str, int]:
        shapes = {name: layer.shape for name, layer in self._targets.items()}
        if config.reference and config.density is not None:
            return allocate_reference(config.density, _base_numel(model), shapes)
        return allocate(config.budget().total(shapes), shapes)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Any) -> PeftConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _create_and_replace(
        self,
        peft_config: SparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if not isinstance(target, DeltaLayer):
            _check_target(self.model, target, current_key)
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            owner = DeltaLayer if layer_kind(base) is Kind.EMBEDDING else DeltaLinear
            layer = owner(target, reference=peft_config.reference)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        self._targets[current_key] = target

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Give the base back, merged or not: no layer that goes may leave deltas in its weight."""
        for module in self.model.modules():
            if isinstance(module, DeltaLayer):
                module.leave_resident()
        base: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        return base

    # -- files -----------------------------------------------------------------------------

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep float32 deltas, or with `autocast_adapter_dtype=False` take the base's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.adapted_layers(adapter_name).values():
                layer.cast_to_base(adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Check an adapter file against the model before a single tensor of it is copied."""
        mapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_adapter_file(model, adapter_name, mapped, cls.prefix)
        return mapped

    # -- what a method may override ----------------------------------------------------------

    def dynamics(self, adapter_name: str, total_steps: int) -> Dynamics | None:
        """Return what changes the support while training, or None for a static support.

        Args:
            adapter_name: the adapter.
            total_steps: number of optimizer updates of the whole run.
        """
        return None

    def adapted_layers(self, adapter_name: str) -> dict[str, DeltaLayer]:
        """Return the layers that carry the adapter, by module name in the base model.

        Not `layers`: PEFT forwards such attributes to the base model, whose `layers` are its own.
        """
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, DeltaLayer) and adapter_name in module.delta_values
        }


def _attach(
    layer: DeltaLayer, name: str, adapter: str, config: SparseConfig, k: int, *, on_meta: bool
) -> None:
    """Choose a support of k positions and add the adapter to the layer."""
    if on_meta:
        indices = torch.empty(k, dtype=torch.int64, device="meta")
    else:
        chosen = strategy(config.selection)
        if chosen.CALIBRATED:
            layer.pending.add(adapter)
            chosen = strategy("random")
        indices = chosen.select(candidates(layer, name, config), k)
    # float64 bases keep their precision; any other base trains float32 deltas
    dtype = layer.get_base_layer().weight.dtype
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.zeros(k, dtype=dtype, device=indices.device)
    if not config.init_weights and not on_meta:
        values = torch.randn(k, dtype=dtype)
    layer.add_adapter(adapter, indices, values, inference_mode=config.inference_mode)


def candidates(
    layer: DeltaLayer, name: str, config: SparseConfig, scores: Tensor | None = None
) -> Candidates:
    """Return what a selection strategy may look at for this layer."""
    return Candidates(
        shape=layer.shape,
        read=layer.pretrained_weight,
        scores=scores,
        largest=config.selection_order == "largest",
        generator=seeded(config.seed, "select", name),
    )


def _check_target(model: nn.Module, target: nn.Module, name: str) -> None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if layer_kind(base) is None:
        raise ValueError(
            f"target_modules: {name!r} is a {type(base).__name__}, allowed are nn.Linear, "
            "transformers' Conv1D and nn.Embedding; leave it out or name it in modules_to_save"
        )
    sharing = [
        f"{owner}.{attribute}"
        for owner, module in model.named_modules()
        if module is not base
        for attribute, parameter in module.named_parameters(recurse=False)
        if parameter is base.weight
    ]
    if sharing:
        raise ValueError(
            f"target_modules: {name!r} shares its weight with {sharing[0]!r}, which would change "
            "too; load the model with tie_word_embeddings=False or leave the module out"
        )


def _base_numel(model: nn.Module) -> int:
    own = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, DeltaLayer)
        for parameter in module.delta_values.parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in own)
