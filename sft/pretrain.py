"""Build a model whose dense matrices never exist: SLTrain from scratch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from sft.adapters.layer import sparse_layers
from sft.adapters.methods.sltrain import SLTrainConfig


def pretrain_model(
    model_config: PretrainedConfig,
    config: SLTrainConfig,
    *,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PeftModel:
    """Return a causal language model with random weights, W = c B A + S in place of each target.

    Embeddings, norms, biases and head start as the model's own code initialises them. At no time
    does memory hold a dense matrix of a target. To go on from a saved one, build it anew and call
    `model.load_adapter(folder, "default", is_trainable=True)`; `merge_and_unload()` composes a
    stock model.

    Args:
        model_config: of the architecture, such as a LlamaConfig.
        config: rank, density, targets; form="pretrain" is filled in.
        seed: of every random number; by default the configuration's own.
        dtype: of what is not c B A + S, and of the merged weights. The parts are float32 at least.
        device: "meta" builds shapes alone, to count.

    Raises:
        ValueError: the architecture does not say how one of its parameters starts.
    """
    chosen = config.seed if seed is None else seed
    config = replace(config, form="pretrain", seed=chosen)
    config.task_type = config.task_type or TaskType.CAUSAL_LM
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    with torch.device(device):
        model: PeftModel = get_peft_model(base, config)
    if torch.device(device).type != "meta":
        with torch.random.fork_rng():
            torch.manual_seed(chosen)
            _materialise(base, torch.device(device))
        base.tie_weights()
        base.to(device)  # buffers
        train_dense(model)
    return model


def _materialise(base: Any, device: torch.device) -> None:
    """Give memory and a start to what is on the meta device still."""
    for name, module in base.named_modules():
        missing = [key for key, p in module.named_parameters(recurse=False) if p.is_meta]
        for key in missing:
            old = module.get_parameter(key)
            fresh = torch.full(old.shape, float("nan"), dtype=old.dtype, device=device)
            module.register_parameter(key, nn.Parameter(fresh))
        if missing:
            base._init_weights(module)
        for key in missing:
            if bool(module.get_parameter(key).isnan().any()):
                raise ValueError(
                    f"model_config: {type(base).__name__} does not initialise {name}.{key}; build "
                    "the model yourself and wrap it with get_peft_model and form='pretrain'"
                )


def train_dense(model: PeftModel) -> None:
    """Train what was materialised, and nothing of the weights that are gone."""
    gone = {id(layer.get_base_layer().weight) for layer in sparse_layers(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in gone)
