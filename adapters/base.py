"""The PEFT plumbing that every sparse method shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from sft.adapters.calibration import Calibration
from sft.adapters.dynamics import Dynamics, Penalty
from sft.adapters.geometry import Kind, layer_kind, stored_weight
from sft.adapters.layer import BASE, SparseLayer
from sft.adapters.loading import check_adapter_file
from sft.adapters.packing import pack_supports, unpack_supports
from sft.adapters.quantized import check_unpacks, keep_packed
from sft.adapters.shapes import on_meta

Owners = dict[int, list[tuple[str, nn.Module]]]


class SparseTuner(BaseTuner):  # type: ignore[misc]
    """A PEFT tuner whose layers train a sparse part of a frozen model.

    A method derives from it, names its `prefix` and its layers' class, and provides `new_layer` and
    `attach`; the verbs after them say what else it asks of a training run.
    """

    tuner_layer_cls: type[SparseLayer] = SparseLayer
    kinds: tuple[Kind, ...] = (Kind.LINEAR, Kind.CONV1D)  # what the method's layers stand around
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name and shape

    # -- what a method provides ----------------------------------------------------------------

    def new_layer(self, config: Any, target: nn.Module, name: str) -> SparseLayer:
        """Return a layer of the method around `target`, without an adapter yet."""
        raise NotImplementedError

    def takes(self, name: str) -> bool:
        """Tell whether a module that PEFT matched by name is a target; all are, by default."""
        return True

    def attach(
        self, adapter: str, config: Any, targets: dict[str, SparseLayer], *, on_meta: bool
    ) -> None:
        """Share the budget out over the targets and give each of them the adapter.

        Args:
            adapter: its name.
            config: its configuration.
            targets: layers by module name in the base model.
            on_meta: tensors go to the meta device: a file follows that fills them.

        Raises:
            ValueError: a target gets nothing to train, or the configuration does not fit.
        """
        raise NotImplementedError

    def dynamics(self, adapter_name: str, total_steps: int) -> Dynamics | None:
        """Return what changes the adapter while training, or None.

        Args:
            adapter_name: the adapter.
            total_steps: number of optimizer updates of the whole run.
        """
        return None

    def parameter_groups(self, adapter_name: str, learning_rate: float) -> list[dict[str, Any]]:
        """Return torch parameter groups for what needs settings of its own, "params" included."""
        return []

    def penalties(self, adapter_name: str) -> list[Penalty]:
        """Return the penalties whose proximal step follows each optimizer step."""
        return []

    def loss_terms(self, adapter_name: str) -> Tensor | None:
        """Return what is added to the training loss of an update, or None."""
        return None

    def stage_ends(self, adapter_name: str, total_steps: int) -> tuple[int, ...]:
        """Return the updates after which a stage ends and optimizer and schedule begin anew."""
        return (total_steps,)

    def check_run(self, adapter_name: str, optimizer: Optimizer, *, adds_loss_terms: bool) -> None:
        """Raise if a run that begins would leave out what the configuration asks for.

        Args:
            adapter_name: the adapter.
            optimizer: makes the run's steps.
            adds_loss_terms: whether the trainer adds `loss_terms` to its loss.
        """

    def calibration(self, adapter_name: str) -> Calibration | None:
        """Return how batches choose the adapter's support, or None if none are needed."""
        return None

    def adapted_layers(self, adapter_name: str) -> dict[str, Any]:
        """Return the layers that carry the adapter, by module name in the base model.

        Not `layers`: PEFT forwards such attributes to the base model, whose `layers` are its own.
        """
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, SparseLayer) and adapter_name in module.trained_values
        }

    # -- injection -----------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """See to it that a packed base is what it is, and stays it, before a method reads it."""
        check_unpacks(model)
        keep_packed(model)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Wrap the targets and attach the adapter to them.

        Raises:
            ValueError: a target can't be adapted, shares its weight, or gets no weight to train.
        """
        self._targets: dict[str, SparseLayer] = {}
        self._owners = owners_of_parameters(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._owners = {}
        config = self.peft_config[adapter_name]
        self.attach(adapter_name, config, self._targets, on_meta=on_meta(kwargs))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Any) -> PeftConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if not self.takes(current_key):
            return
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"target_modules: {current_key!r} is read by its nn.MultiheadAttention and never "
                "called, so it would not train; leave it out with exclude_modules"
            )
        if not isinstance(target, SparseLayer):
            check_target(target, current_key, self.kinds, self._owners)
            layer = self.new_layer(peft_config, target, current_key)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        self._targets[current_key] = target

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a module in another's place. PEFT's own expects a weight of that name."""
        if layer_kind(new_module) is Kind.EXPERTS:
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Give the base back, merged or not: no layer that goes may leave deltas in its weight."""
        for module in self.model.modules():
            if isinstance(module, SparseLayer):
                module.leave_resident()
        base: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        return base

    # -- several adapters in one batch -----------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a forward or generate call down to the layers."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        hook = partial(_pass_names, adapter_names=list(adapter_names))
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, SparseLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("adapter_names: the model is in training mode; call model.eval()")
        unknown = sorted(set(adapter_names) - {BASE, *self.peft_config})
        if unknown:
            known = ", ".join([*self.peft_config, BASE])
            raise ValueError(f"adapter_names: got {unknown[0]!r}, allowed are {known}")

    # -- files -----------------------------------------------------------------------------------

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep float32 deltas, or with `autocast_adapter_dtype=False` take the base's dtype."""
        parts = [
            (getattr(layer, part), getattr(layer, part)[adapter_name].requires_grad)
            for layer in self.adapted_layers(adapter_name).values()
            for part in layer.adapter_layer_names
            if adapter_name in getattr(layer, part)
        ]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for part, trains in parts:  # PEFT puts new parameters in place, which all train
            part[adapter_name].requires_grad_(trains)
        if not autocast_adapter_dtype:
            for layer in self.adapted_layers(adapter_name).values():
                layer.cast_to_base(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return what a file holds of an adapter: positions of single weights are packed."""
        chosen = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return pack_supports(model, adapter_name, chosen)

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
        mapped = unpack_supports(model, adapter_name, mapped)
        check_adapter_file(model, adapter_name, mapped, cls.prefix)
        return mapped


def owners_of_parameters(model: nn.Module) -> Owners:
    """Return by identity the names of each parameter and the modules that hold it."""
    owners: Owners = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((f"{name}.{attribute}", module))
    return owners


def check_target(target: nn.Module, name: str, kinds: Sequence[Kind], owners: Owners) -> None:
    """Raise unless the module is of one of the kinds and has its weight for itself.

    Raises:
        ValueError: another kind of module, or one that shares its weight.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if layer_kind(base) not in kinds:
        allowed = ", ".join(kind.what for kind in kinds)
        raise ValueError(
            f"target_modules: {name!r} is a {type(base).__name__}, allowed are {allowed}; "
            "leave it out or name it in modules_to_save"
        )
    sharing = [owner for owner, module in owners[id(stored_weight(base))] if module is not base]
    if sharing:
        raise ValueError(
            f"target_modules: {name!r} shares its weight with {sharing[0]!r}, which would change "
            "too; load the model with tie_word_embeddings=False or leave the module out"
        )


def _pass_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
