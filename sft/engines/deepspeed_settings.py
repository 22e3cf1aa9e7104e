"""DeepSpeed settings of a Trainer that sparse training runs with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sft.adapters.base import SparseTuner
from sft.adapters.calibrate import pending_adapters
from sft.adapters.geometry import Kind
from sft.adapters.layer import sparse_layers
from sft.adapters.quantized import packed_modules
from sft.identity import sparse_tuner
from sft.optimizer_name import optimizer_name
from sft.updates import wants_per_layer

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORCE = "zero_force_ds_cpu_optimizer"


def check_deepspeed(trainer: Any) -> None:
    """Raise on settings that would fail, or go wrong, once DeepSpeed has the model.

    Where `zero_force_ds_cpu_optimizer` is not given it becomes false: with an offloaded optimizer,
    accelerate else puts DeepSpeed's Adam in the place of the method's optimizer.

    Raises:
        ValueError: key, what was found, and what runs.
    """
    tuner, plugin = sparse_tuner(trainer.model), trainer.accelerator.state.deepspeed_plugin
    assert tuner is not None
    config = plugin.hf_ds_config.config
    check_stepping(tuner)
    _check_precision(config, plugin.zero_stage)
    _check_packed(trainer.model, config)
    names = {optimizer_name(tuner.peft_config[a], trainer.args) for a in tuner.active_adapters}
    _check_optimizer(config, names, tuner)
    _check_offload(config)
    if plugin.zero_stage > 0:
        _check_flat(tuner, names)
    if plugin.zero_stage == 3:
        _check_partitioned(tuner)
    config.setdefault(FORCE, False)
    plugin.deepspeed_config.setdefault(FORCE, False)


def check_stepping(tuner: SparseTuner) -> None:
    """Raise on what steps otherwise than DeepSpeed does, or changes a parameter's size."""
    if wants_per_layer(tuner):
        raise ValueError(
            "per_layer_updates: got True under DeepSpeed, which steps by itself after backward; "
            "set per_layer_updates=False"
        )
    for after in _settings(tuner, "compact_after"):
        if after is not None:
            raise ValueError(
                f"compact_after: got {after} under DeepSpeed, whose buffers are laid out for all "
                "ranks at the start; set compact_after=None"
            )
    if "pooled" in _settings(tuner, "allocation") and pending_adapters(tuner):
        raise ValueError(
            "allocation: got 'pooled' with units chosen by batches under DeepSpeed, whose buffers "
            "are laid out before they are read; set allocation='uniform', or choose them first "
            "with sft.calibrate(model, batches)"
        )


def check_sharded(tuner: SparseTuner, stock: Any) -> None:
    """Raise on an optimizer whose state has no entry for each trained one."""
    check_stepping(tuner)
    if type(stock).__module__.startswith("bitsandbytes"):
        raise ValueError(
            f"optim: got bitsandbytes' {type(stock).__name__} under ZeRO, whose flat vectors mix "
            "blocks of several parameters; set optim=adamw_torch: ZeRO shards its state"
        )


def _check_precision(config: dict[str, Any], stage: int) -> None:
    halves = [key for key in _HALVES if _on(config, key)]
    if stage == 0 and halves:
        raise ValueError(
            f"deepspeed.zero_optimization.stage: got 0 with {halves[0]}, which keeps no masters "
            "that a support could move in; set stage 1"
        )
    types = config.get("data_types", {}).get("grad_accum_dtype")
    if stage == 1 and "bf16" in halves and types == "fp32":
        raise ValueError(
            "deepspeed.data_types.grad_accum_dtype: got 'fp32' with bf16 and stage 1, which has an "
            "optimizer of its own; set stage 2, or leave it out"
        )


def _check_packed(model: nn.Module, config: dict[str, Any]) -> None:
    halves = [dtype for key, dtype in _HALVES.items() if _on(config, key)]
    for _, module in packed_modules(model):
        storage = module.weight.dtype
        if halves and storage.is_floating_point and storage != halves[0]:
            found, half = (str(d).removeprefix("torch.") for d in (storage, halves[0]))
            raise ValueError(
                f"bnb_4bit_quant_storage: got {found} under DeepSpeed in {half}, to which it would "
                f"cast the packed bits; set {half} or uint8"
            )


def _check_optimizer(config: dict[str, Any], names: set[str], tuner: SparseTuner) -> None:
    wanted = names - {"trainer"}
    own = any(tuner.parameter_groups(name, 0.0) for name in tuner.active_adapters)
    if "optimizer" in config and (wanted or own):
        raise ValueError(
            f"deepspeed.optimizer: got {config['optimizer'].get('type')!r}, but the method makes "
            f"its own ({', '.join(sorted(wanted or names))}); leave it out"
        )
    if config.get(FORCE) and wanted and _offload(config).get("device", "none") != "none":
        raise ValueError(
            f"deepspeed.{FORCE}: got true, which would put DeepSpeed's Adam in the place of the "
            f"method's {', '.join(sorted(wanted))}; leave it out"
        )


def _check_offload(config: dict[str, Any]) -> None:
    if _offload(config).get("device") == "nvme":
        raise ValueError(
            "deepspeed.zero_optimization.offload_optimizer.device: got 'nvme', where no support "
            "can move and no checkpoint reads it; set cpu: a sparse part has little state"
        )


def _check_flat(tuner: SparseTuner, names: set[str]) -> None:
    if "sm3" in names:
        growth = "momentum" in _settings(tuner, "growth")
        remedy = "growth='gradient'" if growth else "the method's optimizer='adamw'"
        raise ValueError(
            "optimizer: got sm3 under ZeRO, whose flat vectors have no rows and columns; "
            f"set {remedy}, or deepspeed.zero_optimization.stage 0"
        )


def _check_partitioned(tuner: SparseTuner) -> None:
    if "permuted" in _settings(tuner, "layout"):
        raise ValueError(
            "layout: got 'permuted' under ZeRO-3, where no weight lies whole that could be "
            "reordered; set layout='index'"
        )
    if "pretrain" in _settings(tuner, "form"):
        raise ValueError(
            "form: got 'pretrain' under ZeRO-3, which partitions no parameter of no entries; set "
            "deepspeed.zero_optimization.stage 2"
        )
    for name in pending_adapters(tuner):
        calibration = tuner.calibration(name)
        if calibration is not None and calibration.backward:
            raise ValueError(
                f"selection: got {tuner.peft_config[name].selection!r} under ZeRO-3, that takes no "
                "backward pass beside training's; set stage 2, or a selection without gradients"
            )
    if any(_settings(tuner, "l1")):
        raise ValueError(
            "l1: its term of the loss reads gates under ZeRO-3 that no forward pass has gathered; "
            "set l1=0 and a strength, or deepspeed.zero_optimization.stage 2"
        )
    for name, layer in sparse_layers(tuner).items():
        if layer.kind is Kind.EXPERTS:
            raise ValueError(
                f"target_modules: got the experts of {name!r} under ZeRO-3, which gathers no "
                "weight that a layer reads by itself; set deepspeed.zero_optimization.stage 2"
            )


def _settings(tuner: SparseTuner, key: str) -> list[Any]:
    return [getattr(tuner.peft_config[name], key, None) for name in tuner.active_adapters]


def _on(config: dict[str, Any], key: str) -> bool:
    return config.get(key, {}).get("enabled") is True


def _offload(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("zero_optimization", {}).get("offload_optimizer") or {}
