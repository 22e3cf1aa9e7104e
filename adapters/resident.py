"""Enter and leave resident mode over a whole model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sft.adapters.layer import SparseLayer, sparse_layers
from sft.adapters.residency import write_all

logger = logging.getLogger(__name__)


def enter_resident(model: nn.Module) -> dict[str, str]:
    """Let every layer hold its effective weight; return the reasons of those that run aside."""
    aside = {}
    layers = sparse_layers(model)
    for name, layer in layers.items():
        reason = layer.enter_resident()
        if reason is not None:
            aside[name] = reason
    held = sum(layer.content is not None for layer in layers.values())
    logger.info("%d of %d sparse layers hold resident weights", held, len(layers))
    if aside:
        name, reason = next(iter(aside.items()))
        logger.warning("%d sparse layers run aside: %s, as %s", len(aside), name, reason)
    return aside


def leave_resident(model: nn.Module) -> None:
    """Restore every base weight bit for bit."""
    for layer in sparse_layers(model).values():
        layer.leave_resident()


def sync_resident(model: nn.Module) -> None:
    """Write the trained values to the weights, after an optimizer step."""
    sync_layers(sparse_layers(model).values())


def sync_layers(layers: Iterable[SparseLayer]) -> None:
    """Write the values of these layers together: they moved by any means.

    Right away, not in the next forward pass: a compiled one does not look whether they moved.
    """
    held = [layer for layer in layers if layer.content is not None]
    due = []
    for layer in held:
        layer.sync(now=False)
        wanted = layer.due()
        if wanted is None:
            layer.settle()
        else:
            due.append(wanted)
    write_all(due)


@contextmanager
def resident(model: nn.Module) -> Iterator[nn.Module]:
    """Run the block with resident weights; the base is pre-trained again afterwards, bit for bit.

    While it lasts a forward is one plain GEMM a layer, as in full fine-tuning. Layers whose weight
    can't be written (quantised, sharded, several active adapters) run aside, with a warning.

    Example:
        >>> with sft.resident(model):
        ...     train(model)
    """
    enter_resident(model)
    handle = register_optimizer_step_post_hook(partial(_sync_stepped, model))
    try:
        yield model
    finally:
        handle.remove()
        leave_resident(model)


def _sync_stepped(model: nn.Module, optimizer: Optimizer, *_: Any) -> None:
    """Write what this optimizer moved: fused and 8-bit ones don't raise a tensor's version."""
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    sync_layers(
        layer
        for layer in sparse_layers(model).values()
        if any(id(values) in moved for values in layer.trained_values.values())
    )
