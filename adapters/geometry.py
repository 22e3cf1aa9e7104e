"""How the layers we adapt store their weight."""

from __future__ import annotations

from enum import Enum

from torch import nn
from transformers.pytorch_utils import Conv1D


class Kind(Enum):
    """What a layer multiplies by."""

    LINEAR = "linear"  # W is (out, in), y = x W^T + b
    CONV1D = "conv1d"  # W is (in, out), y = x W + b: GPT-2
    EMBEDDING = "embedding"  # W is (num, dim), y = W[ids]

    @property
    def what(self) -> str:
        """Name the modules of this kind."""
        return {
            Kind.LINEAR: "nn.Linear",
            Kind.CONV1D: "transformers' Conv1D",
            Kind.EMBEDDING: "nn.Embedding",
        }[self]


def layer_kind(base: nn.Module) -> Kind | None:
    """Return the kind of a layer, quantised ones included, or None if it can't be adapted."""
    if isinstance(base, Conv1D):
        return Kind.CONV1D
    if isinstance(base, nn.Embedding):
        return Kind.EMBEDDING
    return Kind.LINEAR if isinstance(base, nn.Linear) else None


def features(base: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) as PEFT counts them."""
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    assert isinstance(base, nn.Linear)
    return base.in_features, base.out_features


def weight_shape(base: nn.Module) -> tuple[int, int]:
    """Return the (rows, cols) of the stored weight; of the logical one where it is packed."""
    inputs, outputs = features(base)
    return (outputs, inputs) if layer_kind(base) is Kind.LINEAR else (inputs, outputs)
