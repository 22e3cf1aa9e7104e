"""How the layers we adapt store their weight."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Kind(Enum):
    """What a layer multiplies by."""

    LINEAR = "linear"  # W is (out, in), y = x W^T + b
    CONV1D = "conv1d"  # W is (in, out), y = x W + b: GPT-2
    EMBEDDING = "embedding"  # W is (num, dim), y = W[ids]
    EXPERTS = "experts"  # W is down_proj, (experts, out, in) or (experts, in, out)

    @property
    def what(self) -> str:
        """Name the modules of this kind."""
        return {
            Kind.LINEAR: "nn.Linear",
            Kind.CONV1D: "transformers' Conv1D",
            Kind.EMBEDDING: "nn.Embedding",
            Kind.EXPERTS: "transformers' experts",
        }[self]


def layer_kind(base: nn.Module) -> Kind | None:
    """Return the kind of a layer, quantised ones included, or None if it can't be adapted."""
    if isinstance(base, Conv1D):
        return Kind.CONV1D
    if isinstance(base, nn.Embedding):
        return Kind.EMBEDDING
    if isinstance(base, nn.Linear):
        return Kind.LINEAR
    return Kind.EXPERTS if _are_experts(base) else None


def _are_experts(base: nn.Module) -> bool:
    """Tell whether this is a module of 3-D parameters behind transformers' experts interface."""
    down: Any = getattr(base, "down_proj", None)
    plain = type(down) is nn.Parameter or hasattr(down, "device_mesh")  # whole, or FSDP's shard
    return plain and down.dim() == 3 and hasattr(base, "is_transposed")


def stored_weight(base: nn.Module) -> Tensor:
    """Return the parameter that adapters of a layer change."""
    weight = base.down_proj if layer_kind(base) is Kind.EXPERTS else base.weight
    assert isinstance(weight, Tensor)
    return weight


def features(base: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) as PEFT counts them; inputs of all experts together."""
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    if _are_experts(base):
        down: Any = base.down_proj
        experts, first, second = down.shape
        inputs, outputs = (first, second) if base.is_transposed else (second, first)
        return experts * inputs, outputs
    assert isinstance(base, nn.Linear)
    return base.in_features, base.out_features


def weight_shape(base: nn.Module) -> tuple[int, int]:
    """Return the (rows, cols) of the stored weight; of the logical one where it is packed."""
    inputs, outputs = features(base)
    stored_out_in = layer_kind(base) in (Kind.LINEAR, Kind.EXPERTS)
    return (outputs, inputs) if stored_out_in else (inputs, outputs)
