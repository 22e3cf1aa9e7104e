"""Gradient checkpointing that recomputes what backward needs, and no layer below it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Floor:
    """Ends backward at the lowest trained layer of a model whose layers are checkpointed.

    Trainer, PEFT and TRL let the embedded inputs require a gradient, as checkpoints of the old,
    reentrant kind return none otherwise. With it every layer is recomputed, down to the first,
    trained or not. The new kind needs no such thing: a layer that has nothing trained in or below
    it keeps nothing and is not recomputed.

    Args:
        model: about to be trained. Embeddings in which something is trained are left alone, as
            are reentrant checkpoints, which TRL wants under ZeRO-3.
    """

    def __init__(self, model: nn.Module) -> None:
        self._hooks: list[RemovableHandle] = []
        kinds = {_reentrant(module) for module in _checkpointed(model)}
        if kinds != {False}:
            return
        for embeddings in _input_embeddings(model):
            if not any(p.requires_grad for p in embeddings.parameters()):
                # after theirs, as it is registered later
                self._hooks.append(embeddings.register_forward_hook(_cut))

    def remove(self) -> None:
        """Leave gradients of the inputs to others again."""
        while self._hooks:
            self._hooks.pop().remove()


def warn_of_checkpoints(model: nn.Module) -> None:
    """Say so if checkpoints are of the kind that recomputes every layer."""
    if any(_reentrant(module) for module in _checkpointed(model)):
        logger.warning(
            "gradient_checkpointing_kwargs: use_reentrant=True recomputes every layer, trained or "
            "not; set it to False to recompute from the lowest trained one upwards"
        )


def _reentrant(module: Any) -> bool:
    keywords = getattr(module._gradient_checkpointing_func, "keywords", {})
    return bool(keywords.get("use_reentrant"))


def _checkpointed(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that run within a checkpoint."""
    for module in model.modules():
        on = getattr(module, "gradient_checkpointing", False)
        if on and hasattr(module, "_gradient_checkpointing_func"):
            yield module


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the embeddings of the model and of those within it, once each."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        try:
            embeddings = module.get_input_embeddings()
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Module):
            found[id(embeddings)] = embeddings
    return list(found.values())


def _cut(module: nn.Module, args: Any, output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else output
