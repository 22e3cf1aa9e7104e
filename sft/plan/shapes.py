"""The model of a recipe and its method as fake tensors: shapes, dtypes, and no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sft.adapters.layer import sparse_layers
from sft.adapters.shapes import shapes_alone
from sft.models import load_config
from sft.recipe.schema import Recipe
from sft.run.build import keep_heads
from sft.run.trainable import Trainable
from sft.tasks.find import build_task


def build(recipe: Recipe, method: Trainable, config: Any) -> Any:
    """Return the model with its method on the meta device, ready to train.

    Args:
        recipe: resolved.
        method: of it.
        config: of the model, by `model_config`.

    Raises:
        ValueError: method and model do not fit.
    """
    dtype = _dtype(recipe, config)
    if method.from_scratch:
        from sft.pretrain import pretrain_model, train_dense

        model: Any = pretrain_model(config, method.config, dtype=dtype, device="meta")
        model.get_base_model().tie_weights()
        train_dense(model)
        return model
    task = build_task(recipe.task)
    if recipe.task["name"] == "reward":
        config.num_labels = 1
    if getattr(config.get_text_config(), "pad_token_id", 0) is None:  # the tokenizer's, in a run
        config.get_text_config().pad_token_id = 0
    with torch.device("meta"):
        model = getattr(transformers, task.auto).from_config(
            config, dtype=dtype, trust_remote_code=recipe.model.trust_remote_code
        )
    keep_heads(method.config, task.heads(model))
    if not method.saved:
        return method.attach(model, recipe.model)
    with shapes_alone():
        return peft.get_peft_model(model, method.config, low_cpu_mem_usage=True)


def model_config(recipe: Recipe) -> Any:
    """Return the configuration of the recipe's model; no weight is read.

    Raises:
        UserError: it does not load.
    """
    return load_config(recipe.model)


def _dtype(recipe: Recipe, config: Any) -> torch.dtype:
    if recipe.model.dtype != "auto":
        found: torch.dtype = getattr(torch, recipe.model.dtype)
        return found
    return getattr(config, "dtype", None) or torch.float32


@contextmanager
def faking() -> Iterator[None]:
    """Let tensors made in the block be fake ones of a CPU."""
    # what was computed before the block, such as a model's constants, may take part
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def place(model: nn.Module) -> dict[int, Tensor]:
    """Give a model of the meta device fake tensors of a CPU; within `faking`.

    Returns:
        the new tensors by the `id` of the old ones, which the caller keeps alive.
    """
    placed: dict[int, Tensor] = {}  # shared tensors stay shared
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in placed:
                    placed[id(tensor)] = _like(tensor)
                held[name] = placed[id(tensor)]  # type: ignore[assignment]
    for layer in sparse_layers(model).values():
        layer.pending.clear()
    return placed


def _like(tensor: Tensor) -> Tensor:
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fresh, requires_grad=tensor.requires_grad)
    return fresh
