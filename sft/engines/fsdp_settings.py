"""FSDP settings of a Trainer that sparse training runs with."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_fsdp(trainer: Any) -> None:
    """Raise on settings that would fail, or go wrong, once the model is sharded.

    Raises:
        ValueError: key, what was found, and what runs.
    """
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
    if trainer.zeroth_order is not None:
        raise ValueError(
            "fsdp: got true with zeroth_order, which perturbs whole parameters in every process; "
            "leave fsdp out: without backward, the weights are all the memory there is"
        )
    check_dtypes(trainer.model)


def check_dtypes(model: nn.Module) -> None:
    """Raise unless all trained parameters have one dtype: FSDP reduces their gradients together."""
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if len(found) > 1:
        raise ValueError(
            f"fsdp: got trained parameters of {' and '.join(sorted(found))}, allowed is one dtype; "
            "leave autocast_adapter_dtype at True and load modules_to_save in float32"
        )
