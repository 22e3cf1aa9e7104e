"""The tensors of a sharded model that its adapters' files hold, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import (
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor

from sft.adapters.gathered import is_partitioned, read_whole
from sft.optim.shards import is_sharded, whole


def whole_adapters(model: PeftModel) -> dict[str, Tensor]:
    """Return the part of a state dict that `save_pretrained` writes; no rank gathers the base.

    Args:
        model: sharded; every rank takes part.
    """
    state: dict[str, Any] = model.state_dict()
    wanted: set[int] = set()
    for adapter in model.peft_config:
        chosen = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=adapter)
        wanted |= {id(tensor) for tensor in chosen.values()}
    found = {
        name: whole(tensor) if isinstance(tensor, Tensor) else tensor
        for name, tensor in state.items()
        if id(tensor) in wanted or not is_sharded(tensor)
    }
    # PEFT saves an adapted embedding with its frozen table, which ZeRO-3 may keep in parts
    tables = {
        name: read_whole(parameter).cpu()
        for name, parameter in model.named_parameters()
        if is_partitioned(parameter) and not parameter.requires_grad and id(state[name]) in wanted
    }
    return found | tables


def load_adapters(model: PeftModel, folder: Path) -> None:
    """Read the adapters of a checkpoint into the parameters that are there.

    Unlike `PeftModel.load_adapter`, which casts what it has read by putting other parameters in
    place: those that an engine steps are then nobody's.

    Args:
        model: its parameters are whole.
        folder: written by `save_pretrained`.
    """
    for adapter in model.peft_config:
        own = folder if adapter == "default" else folder / adapter
        read = load_peft_weights(str(own), device="cpu")
        # a frozen table that PEFT saved is the base's, which ZeRO-3 may keep in parts
        tensors = {name: t for name, t in read.items() if not name.endswith(".base_layer.weight")}
        set_peft_model_state_dict(model, tensors, adapter_name=adapter)
