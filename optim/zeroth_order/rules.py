"""What an update does with projected gradients: the arithmetic of each rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

STATEFUL = {"momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
ADAM_EPS = 1e-8

Draws = list[tuple[int, float]]


def coefficients(gradients: Sequence[float], lr: float, *, rule: str) -> list[float]:
    """Return what each direction is multiplied by: w <- w - sum_q c_q z_q.

        c_q = lr g_q / n,  or for the sign rule  lr sign(g_q) / n

    The sign is that of the number g_q, so every entry moves by the same amount.

    Args:
        gradients: g_q of n directions.
        lr: learning rate.
        rule: "sign", or any other.

    Returns:
        n numbers that float32 holds.
    """
    if rule == "sign":
        gradients = [float((g > 0) - (g < 0)) for g in gradients]
    return [single(lr * g / len(gradients)) for g in gradients]


def decay_of(lr: float, weight_decay: float) -> float:
    """Return the share of itself that a weight loses in an update, as float32 holds it."""
    return single(lr * weight_decay)


def single(number: float) -> float:
    """Return the nearest number that float32 holds."""
    return float(torch.tensor(number, dtype=torch.float32))


def joined(draws: Iterable[tuple[int, float]], moved: Iterable[tuple[int, float]]) -> Draws:
    """Return the draws that lead from where weights have been moved to where `draws` lead from w.

    Draws of one key become one; what comes to nothing is left out.

    Args:
        draws: (key, c) of w - sum c z, each key once.
        moved: of where the weights stand now, in the same convention.
    """
    way = dict(draws)
    for key, offset in moved:
        way[key] = way.get(key, 0.0) - offset
    return [(key, c) for key, c in way.items() if c != 0]


def momentum_step(gradient: Tensor, buffer: Tensor, *, momentum: float) -> tuple[Tensor, Tensor]:
    """Return the direction and the new state of SGD with momentum: b = momentum b + g, twice.

    Args:
        gradient: g, fp32, any shape.
        buffer: b, fp32, same shape; zero before the first update.
        momentum: in [0, 1).
    """
    buffer = buffer * momentum + gradient
    return buffer, buffer


def adam_step(
    gradient: Tensor, mean: Tensor, square: Tensor, *, betas: tuple[float, float], updates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the direction and the new moments of Adam.

        m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-8)

    Args:
        gradient: g, fp32, any shape.
        mean: m, fp32, same shape; zero before the first update.
        square: v, likewise.
        betas: b1, b2.
        updates: t, counting this one.

    Paper: arXiv 1412.6980; with the decay outside, AdamW, arXiv 1711.05101.
    """
    mean = mean * betas[0] + gradient * (1 - betas[0])
    square = square * betas[1] + gradient * gradient * (1 - betas[1])
    root = (square / (1 - betas[1] ** updates)).sqrt_().add_(ADAM_EPS)
    return (mean / (1 - betas[0] ** updates)).div_(root), mean, square
