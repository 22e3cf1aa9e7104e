"""An update and the perturbation after it, in one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sft.kernels.displace import check, displace, displace_reference
from sft.kernels.library import define
from sft.kernels.mask import Mask, coded, decoded
from sft.kernels.noise import signed

Draws = Sequence[tuple[int, float]]


@torch.no_grad()
def displace_twice(
    weights: Sequence[Tensor],
    parameters: Sequence[int],
    draws: Draws,
    then: Draws,
    *,
    kind: str = "rademacher",
    decays: Sequence[float] | None = None,
    masks: Sequence[Mask | None] | None = None,
    out: Sequence[Tensor] | None = None,
    ahead: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the weights moved along `draws`, rounded, and moved again along `then`.

        u = round(w - (sum_q c_q z_q + decay w)),    a = round(u - sum_q c'_q z'_q)

    Bit for bit two calls of `displace`, of which the second reads the masks from u. A GPU reads
    w once and writes what is asked for: u, a or both; w - u - a takes 6 bytes of a 16-bit weight
    where two calls take 8, and 4 if a alone is wanted.

    Args:
        weights: tensors of any layout and float dtype of 16 bits or more, all on one device.
        parameters: the number of each, 32 bits.
        draws: (key, c) of each direction of the update.
        then: of each direction of the perturbation after it.
        kind: of the noise, one of `KINDS`.
        decays: what the update subtracts of each weight itself.
        masks: which part of each tensor moves; None moves all.
        out: where u goes; the weights themselves for in place. None drops it.
        ahead: where a goes; None allocates.

    Returns:
        the tensors that hold a.

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not fit.

    Paper: MeZO, arXiv 2305.17333, Algorithm 1, whose steps of two updates meet here.
    """
    ahead = [torch.empty_like(w) for w in weights] if ahead is None else list(ahead)
    decays = [0.0] * len(weights) if decays is None else decays
    masks = [None] * len(weights) if masks is None else masks
    for where in (ahead, out or ahead):
        check(weights, parameters, kind, decays, masks, where, None, [0] * len(weights))
    numbers = list(parameters), list(decays)
    DISPLACE_TWICE(
        list(weights), list(out or ()), ahead, *numbers, *coded(masks), *_split(draws),
        *_split(then), kind,
    )  # fmt: skip
    return ahead


def _split(draws: Draws) -> tuple[list[int], list[float]]:
    return [signed(key) for key, _ in draws], [float(c) for _, c in draws]


def _displace_twice(
    weights: list[Tensor],
    out: list[Tensor],
    ahead: list[Tensor],
    parameters: list[int],
    decays: list[float],
    masks: list[int],
    mask_keys: list[int],
    limits: list[float],
    keys: list[int],
    coefficients: list[float],
    then_keys: list[int],
    then_coefficients: list[float],
    kind: str,
) -> None:
    chosen = list(map(decoded, masks, mask_keys, limits))
    draws = list(zip(keys, coefficients, strict=True))
    then = list(zip(then_keys, then_coefficients, strict=True))
    moved = out or ahead
    displace(weights, parameters, draws, kind=kind, decays=decays, masks=chosen, out=moved)
    displace(moved, parameters, then, kind=kind, masks=chosen, out=ahead)


DISPLACE_TWICE = define(
    "displace_twice_(Tensor[] weights, Tensor(a!)[] out, Tensor(b!)[] ahead, int[] parameters, "
    "float[] decays, int[] masks, int[] mask_keys, float[] limits, int[] keys, "
    "float[] coefficients, int[] then_keys, float[] then_coefficients, str kind) -> ()",
    plain=_displace_twice,
    triton="displace:displace_twice_",
    fake=lambda *arguments: None,
)


def displace_twice_reference(
    weight: Tensor,
    parameter: int,
    draws: Draws,
    then: Draws,
    *,
    kind: str = "rademacher",
    decay: float = 0.0,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor]:
    """Oracle of `displace_twice`: u and a, one after the other."""
    u = displace_reference(weight, parameter, draws, kind=kind, decay=decay, mask=mask)
    return u, displace_reference(u, parameter, then, kind=kind, mask=mask)
