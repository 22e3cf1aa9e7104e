"""FSDP settings of a Trainer that sparse training runs with."""

from __future__ import annotations

from typing import Any

from torch import nn

from sft.adapters.base import SparseTuner
from sft.adapters.calibrate import pending_adapters
from sft.identity import sparse_tuner


def check_fsdp(trainer: Any) -> None:
    """Raise on settings that would fail, or go wrong, once the model is sharded.

    Args:
        trainer: asks for FSDP, whether or not it gets it.

    Raises:
        ValueError: key, what was found, and what runs.
    """
    if not trainer.is_fsdp_enabled:
        raise ValueError(
            f"fsdp: got true on {trainer.args.device.type}, where accelerate shards nothing and "
            "says nothing; leave it out, or run on accelerators"
        )
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_config.version: got {plugin.fsdp_version}, whose flat shards have no trained "
            "values of their own; set version: 2"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_config.cpu_ram_efficient_loading: got true, which leaves the weights of all "
            "ranks but one unread and shards no index; set it to false"
        )
    tuner = sparse_tuner(trainer.model)
    assert tuner is not None
    check_method(tuner, pending=bool(pending_adapters(trainer.model)))
    check_dtypes(trainer.model)


def check_method(tuner: SparseTuner, *, pending: bool) -> None:
    """Raise on settings of active adapters that need whole weights, or other sizes of values.

    Args:
        tuner: of the model.
        pending: a support is still to be chosen, by batches.
    """
    refused = _REFUSED | (_REFUSED_PENDING if pending else {})
    for config in (tuner.peft_config[name] for name in tuner.active_adapters):
        for key, (allowed, why) in refused.items():
            value = getattr(config, key, allowed)
            if value != allowed:
                raise ValueError(f"{key}: got {value!r} under FSDP, {why}; set {key}={allowed!r}")


def check_dtypes(model: nn.Module) -> None:
    """Raise unless all trained parameters have one dtype: FSDP reduces their gradients together."""
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if len(found) > 1:
        raise ValueError(
            f"fsdp: got trained parameters of {' and '.join(sorted(found))}, allowed is one dtype; "
            "leave autocast_adapter_dtype at True and load modules_to_save in float32"
        )


# by key: the value that runs, and why no other does
_REFUSED: dict[str, tuple[Any, str]] = {
    "compact_after": (None, "whose shards keep their size"),
    "layout": ("index", "where no weight lies whole that could be reordered"),
    "per_layer_updates": (False, "which hands out gradients after backward"),
}
_REFUSED_PENDING: dict[str, tuple[Any, str]] = {
    "allocation": ("uniform", "whose shards keep their size while batches choose a support"),
}
