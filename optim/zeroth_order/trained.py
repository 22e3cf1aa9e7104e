"""The trained set: which tensors a zeroth-order step moves, under which number and mask."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sft.kernels.magnitude_threshold import magnitude_thresholds
from sft.kernels.mask import Magnitude, Mask, Random
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.keys import mask_key, parameter_ids

TIES = 0.01  # share of a tensor that may be trained beyond what was asked for, without a word
PIECE = 2**20  # entries that are counted at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """One tensor of the trained set."""

    name: str  # full, as in the model's named_parameters
    parameter: nn.Parameter
    id: int  # 32 bits, the parameter's part of the noise counter
    mask: Mask | None = None  # which entries move; None: all


def trained_set(
    parameters: Iterable[tuple[str, nn.Parameter]], config: ZerothOrderConfig, seed: int
) -> list[Trained]:
    """Number the parameters and fix their masks by the weights as they are now.

    Args:
        parameters: full names and tensors, each tensor once.
        config: `sparsity` and `mask` say which part of each tensor is trained.
        seed: of the run, for random masks.

    Returns:
        in the order given, without the tensors whose magnitude threshold is 0: an entry that left
        zero would never move again.

    Raises:
        ValueError: nothing is left to train, or a parameter cannot be trained.
    """
    named = list(parameters)
    ids = parameter_ids(name for name, _ in named)
    found, left_out = [], []
    masks = _masks(named, config, seed)
    for (name, parameter), mask in zip(named, masks, strict=True):
        if isinstance(mask, Magnitude) and mask.threshold == 0:
            left_out.append(name)
        else:
            found.append(Trained(name, parameter, ids[name], mask))
    if left_out:
        logger.warning(
            "sparsity: %d tensors are left out, as their smallest weights are all zero: %s",
            len(left_out),
            _listed(left_out),
        )
    tied = [t.name for t in found if _is_tied(t, 1 - config.sparsity)]
    if tied:
        logger.warning(
            "sparsity: of %d tensors more than %.3g%% is trained, as many weights are as large as "
            "the threshold: %s",
            len(tied),
            100 * (1 - config.sparsity),
            _listed(tied),
        )
    if not found:
        raise ValueError(
            "model: has no parameter that can be trained: none requires a gradient, or "
            f"sparsity={config.sparsity} met zero weights alone; set sparsity=0 for adapters"
        )
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _is_tied(trained: Trained, share: float) -> bool:
    """Whether a magnitude mask takes in many more entries than it was asked for, as of all ones."""
    if not isinstance(trained.mask, Magnitude):
        return False
    weight = trained.parameter.detach().flatten()
    counts = [(piece.abs() <= trained.mask.threshold).sum() for piece in torch.split(weight, PIECE)]
    spare = int(sum(counts)) - math.ceil(share * len(weight))
    return spare > TIES * len(weight)


def _masks(
    named: Sequence[tuple[str, nn.Parameter]], config: ZerothOrderConfig, seed: int
) -> list[Mask | None]:
    for name, parameter in named:
        if parameter.element_size() == 1:
            raise ValueError(
                f"model: {name} is {str(parameter.dtype).removeprefix('torch.')}, allowed are "
                "floats of 16 bits or more; let it require no gradient, or train an adapter"
            )
    share = 1 - config.sparsity
    if config.sparsity == 0:
        return [None] * len(named)
    if config.mask == "random":
        return [Random(mask_key(seed), share)] * len(named)
    thresholds = magnitude_thresholds([p.detach() for _, p in named], share).tolist()
    for (name, _), threshold in zip(named, thresholds, strict=True):
        if not math.isfinite(threshold):
            raise ValueError(f"model: {name} holds weights that are not finite; mend them first")
    return [Magnitude(threshold) for threshold in thresholds]
