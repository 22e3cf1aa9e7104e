"""Weights moved along counter-based noise: the one operation of zeroth-order training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sft.kernels.cpu import native
from sft.kernels.cpu.displace import Item, coefficient, displace_on_cpu
from sft.kernels.library import define, implementation
from sft.kernels.mask import Mask, coded, decoded, mask_of
from sft.kernels.noise import TILE, Run, check_kind, noise, signed, tile_words


@dataclass(frozen=True)
class Drawn:
    """Words drawn ahead: (key, parameter) -> (tiles, words) int32."""

    kind: str
    words: dict[tuple[int, int], Tensor]


@torch.no_grad()
def displace(
    weights: Sequence[Tensor],
    parameters: Sequence[int],
    draws: Sequence[tuple[int, float]],
    *,
    kind: str = "rademacher",
    decays: Sequence[float] | None = None,
    masks: Sequence[Mask | None] | None = None,
    out: Sequence[Tensor] | None = None,
    drawn: Drawn | None = None,
    starts: Sequence[int] | None = None,
) -> list[Tensor]:
    """Return the weights moved along draws of noise; where a mask is 0 the stored bits are kept.

        out = round(w - (c_1 z_1 + ... + c_n z_n + decay w))

    in float32 (float64 for float64 weights), summed in this order, rounded once to the dtype of w.
    The same arguments give the same bits: whole or in parts, in place or not, alone or among
    other tensors, on every device (kind "gaussian": on every device of one kind).

    Args:
        weights: tensors of any layout and float dtype of 16 bits or more, all on one device.
        parameters: the number of each, 32 bits.
        draws: (key, c) of each direction; w + eps z is c = -eps. c is rounded to float32, to 16
            significant bits for "gaussian_table"; draws of c = 0 are left out.
        kind: of the noise, one of `KINDS`.
        decays: what is subtracted of each weight itself.
        masks: which part of each tensor moves; None moves all.
        out: where to; the weights themselves for in place. None allocates.
        drawn: words from `draw_ahead`; those it lacks are drawn here.
        starts: flat index in its parameter at which each tensor starts, if it is a part of one.

    Returns:
        The tensors written to.

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not fit.

    Papers: MeZO, arXiv 2305.17333, Algorithm 1; Sparse MeZO, arXiv 2402.15751, for the mask.
    Buffers: three of 2 MiB a thread, and a bit a weight for each of many draws.
    """
    out = [torch.empty_like(w) for w in weights] if out is None else list(out)
    decays = [0.0] * len(weights) if decays is None else decays
    masks = [None] * len(weights) if masks is None else masks
    starts = [0] * len(weights) if starts is None else starts
    check(weights, parameters, kind, decays, masks, out, drawn, starts)
    if _plainly(weights):
        items = list(map(Item, weights, out, parameters, decays, masks, starts))
        displace_on_cpu(items, draws, kind, {} if drawn is None else drawn.words)
        return out
    keys, coefficients = [signed(key) for key, _ in draws], [float(c) for _, c in draws]
    numbers = list(parameters), list(starts), list(decays)
    DISPLACE(weights, out, *numbers, *coded(masks), keys, coefficients, kind)
    return out


def _plainly(weights: Sequence[Tensor]) -> bool:
    """Whether to leave the op out: it takes no words that were drawn ahead, and some time."""
    if torch.compiler.is_compiling():
        return False
    return not weights or implementation(weights[0].device) == "torch"


def _displace(
    weights: list[Tensor],
    out: list[Tensor],
    parameters: list[int],
    starts: list[int],
    decays: list[float],
    masks: list[int],
    mask_keys: list[int],
    limits: list[float],
    keys: list[int],
    coefficients: list[float],
    kind: str,
) -> None:
    chosen = map(decoded, masks, mask_keys, limits)
    items = list(map(Item, weights, out, parameters, decays, chosen, starts))
    displace_on_cpu(items, list(zip(keys, coefficients, strict=True)), kind, {})


DISPLACE = define(
    "displace_(Tensor[] weights, Tensor(a!)[] out, int[] parameters, int[] starts, float[] decays, "
    "int[] masks, int[] mask_keys, float[] limits, int[] keys, float[] coefficients, str kind)"
    " -> ()",
    plain=_displace,
    triton="displace:displace_",
    fake=lambda *arguments: None,
)


def draw_ahead(
    keys: Sequence[int],
    parameters: Sequence[int],
    numels: Sequence[int],
    kind: str,
    device: torch.device | str = "cpu",
) -> Drawn:
    """Draw the words of many tensors at once, for several calls of `displace`.

    A bit a weight for each key (16 or 32 for the normals). Empty for other devices than the CPU,
    and where compiled code runs: they draw in registers.
    """
    check_kind(kind)
    if torch.device(device).type != "cpu" or native.wanted():
        return Drawn(kind, {})
    tiles = [-(-numel // TILE) for numel in numels]
    runs = [Run(parameter, 0, count) for parameter, count in zip(parameters, tiles, strict=True)]
    words = {}
    for key in keys:
        drawn, done = tile_words(key, runs, kind), 0
        for run in runs:
            words[key, run.parameter] = drawn[done : done + run.tiles]
            done += run.tiles
    return Drawn(kind, words)


def check(
    weights: Sequence[Tensor],
    parameters: Sequence[int],
    kind: str,
    decays: Sequence[float],
    masks: Sequence[Mask | None],
    out: Sequence[Tensor],
    drawn: Drawn | None,
    starts: Sequence[int],
) -> None:
    """Refuse arguments of `displace` that do not fit each other."""
    check_kind(kind)
    if drawn is not None and drawn.kind != kind:
        raise ValueError(f"drawn: got words for {drawn.kind!r}, allowed is noise {kind!r}")
    lists = {"parameters": parameters, "decays": decays, "masks": masks, "starts": starts}
    for name, given in lists.items():
        _require(len(given) == len(weights), name, len(given), f"one for each of {len(weights)}")
    _require(len(out) == len(weights), "out", len(out), f"one for each of {len(weights)}")
    for w, o in zip(weights, out, strict=True):
        wide = w.is_floating_point() and w.element_size() > 1
        _require(wide, "weights", w.dtype, "a float dtype of 16 bits or more")
        fits = (o.shape, o.dtype, o.device) == (w.shape, w.dtype, w.device)
        _require(fits, "out", (tuple(o.shape), o.dtype, str(o.device)), "shaped like its weight")
        _require(w.device == weights[0].device, "weights", str(w.device), "one device a call")


def _require(fits: bool, name: str, given: object, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name}: got {given}, allowed is {allowed}")


def displace_reference(
    weight: Tensor,
    parameter: int,
    draws: Sequence[tuple[int, float]],
    *,
    kind: str = "rademacher",
    decay: float = 0.0,
    mask: Mask | None = None,
) -> Tensor:
    """Oracle of `displace`: one dense tensor after another (MeZO's `PerturbParameters`)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w = weight.to(wide).contiguous().view(-1)
    total = torch.zeros_like(w)
    for key, c in draws:
        z = noise(key, parameter, w.numel(), kind=kind).to(wide)
        total += torch.tensor(coefficient(c, kind, wide), dtype=wide) * z
    if decay:
        total += torch.tensor(decay, dtype=wide) * w
    moved = (w - total).to(weight.dtype).view(weight.shape)
    return moved if mask is None else torch.where(mask_of(weight, parameter, mask), moved, weight)
