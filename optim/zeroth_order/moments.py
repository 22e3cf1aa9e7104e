"""Momentum and Adam on projected gradients: dense state, moved chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sft.kernels.mask import Random, mask_of
from sft.kernels.noise import MASK, TILE, Run, fields, noise, tile_words
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.rules import STATEFUL, adam_step, momentum_step
from sft.optim.zeroth_order.trained import Trained

CHUNK = 2**16  # entries: temporaries of 256 KiB, and whole tiles of noise

Draws = Sequence[tuple[int, float]]


@torch.no_grad()
def moment_step_(
    trained: Trained,
    state: dict[str, Tensor],
    draws: Draws,
    config: ZerothOrderConfig,
    *,
    lr: float,
    decay: float,
    updates: int,
) -> None:
    """Take one step of momentum or Adam along g = sum_q c_q z_q, in place.

        w <- round(w - (lr direction(g) + decay w))

    In fp32 (fp64 for fp64 weights), where the mask is 1; elsewhere weight and state keep their
    bits.

    Args:
        trained: the tensor; its mask is taken of the weights as they are.
        state: fp32 tensors of its shape, by the names in `STATEFUL`; made when empty.
        draws: (key, c) with the projected gradients over their number as c.
        config: gives rule, noise, momentum and betas.
        lr: learning rate.
        decay: lr * weight_decay.
        updates: number of updates with this one, for Adam's bias correction.
    """
    weight = trained.parameter.data
    names = STATEFUL[config.update]
    for name in names:
        if name not in state:
            state[name] = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    held = weight.contiguous()
    flats = [held.view(-1), *(state[name].view(-1) for name in names)]
    for start, (values, *slots) in _chunks(flats):
        gradient = _gradient(trained, draws, config.noise, start, values)
        kept = _kept(trained, start, values)
        direction, *new = _direction(gradient, slots, config, updates)
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        step = direction.to(wide.dtype) * lr
        if decay:
            step += wide * decay
        results = [(wide - step).to(values.dtype), *new]
        for slot, result in zip((values, *slots), results, strict=True):
            slot.copy_(result if kept is None else torch.where(kept, result, slot))
    if held is not weight:
        weight.copy_(held)


def _chunks(flats: list[Tensor]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    for start in range(0, flats[0].numel(), CHUNK):
        yield start, tuple(flat[start : start + CHUNK] for flat in flats)


def _gradient(trained: Trained, draws: Draws, kind: str, start: int, like: Tensor) -> Tensor:
    gradient = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for key, c in draws:
        z = noise(key, trained.id, like.numel(), kind=kind, start=start, device=like.device)
        gradient += z * c
    return gradient


def _kept(trained: Trained, start: int, values: Tensor) -> Tensor | None:
    """Return where the mask is 1, None for everywhere."""
    mask = trained.mask
    if isinstance(mask, Random):
        run = Run(trained.id, start // TILE, -(-values.numel() // TILE))
        chosen = fields(tile_words(mask.key, [run], "gaussian_table", MASK)).view(-1)
        return (chosen[: values.numel()] < mask.limit).to(values.device)
    return None if mask is None else mask_of(values, trained.id, mask)


def _direction(
    gradient: Tensor, slots: Sequence[Tensor], config: ZerothOrderConfig, updates: int
) -> tuple[Tensor, ...]:
    if config.update == "momentum":
        return momentum_step(gradient, slots[0], momentum=config.momentum)
    return adam_step(gradient, slots[0], slots[1], betas=config.betas, updates=updates)
