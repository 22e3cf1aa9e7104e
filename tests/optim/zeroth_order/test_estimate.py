"""Facts of the estimators: by hand on small numbers, and their moments over many directions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sft.kernels.noise import noise
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.estimate import (
    conservative_choice,
    curvature_weight,
    projected_gradients,
    rounded,
)

NAN, INF = math.nan, math.inf
KINDS = ["rademacher", "gaussian_table", "gaussian"]


def config(**changes: object) -> ZerothOrderConfig:
    return ZerothOrderConfig(**{"eps": 0.5, **changes})  # type: ignore[arg-type]


def directions(count: int, dim: int, kind: str, key: int = 7) -> Tensor:
    """Return (count, dim) fp64: each row a direction; entries are independent, so one key serves"""
    return noise(key, 1, count * dim, kind=kind).view(count, dim).double()


def test_the_estimators_by_hand() -> None:
    # L(w + u) = 5, L(w - u) = 2, L(w) = 3 at eps 1/2
    assert projected_gradients(config(), [5.0], [2.0], None) == [3.0]
    assert projected_gradients(config(estimator="one_side"), [5.0, 2.0], None, 3.0) == [4.0, -2.0]
    # c = (5 - 6 + 2) / 0.25 = 4
    (g,) = projected_gradients(config(estimator="one_and_half"), [5.0], [2.0], 3.0) or [NAN]
    assert g == rounded([3 / 4**0.1], "float32")[0]


def test_flat_and_mildly_curved_directions_keep_their_weight() -> None:
    assert curvature_weight(1.0, 1.0, 1.0, 1e-3) == 1
    assert curvature_weight(1.0, 0.0, -0.1, 1.0) == 1
    assert curvature_weight(2.0, 0.0, 0.0, 0.1) == pytest.approx(200**-0.1)
    # a hollow counts like a hill
    assert curvature_weight(0.0, 2.0, 0.0, 0.1) == curvature_weight(4.0, 2.0, 4.0, 0.1)


def test_z15_clip_bounds_both_signs_and_comes_before_rounding() -> None:
    plus, minus = [9.0, 0.0, 2.1], [0.0, 9.0, 2.0]
    found = projected_gradients(config(clip=0.3, log_dtype="float16"), plus, minus, None)
    bound = rounded([0.3], "float16")[0]
    assert found == [bound, -bound, rounded([2.1 - 2.0], "float16")[0]]
    # what 16 bits cannot hold is clipped, not skipped
    huge = config(clip=1e4, log_dtype="float16")
    assert projected_gradients(huge, [1e9], [0.0], None) == [1e4]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_are_numbers_of_the_log(dtype: str) -> None:
    third = projected_gradients(config(log_dtype=dtype), [1 / 3], [0.0], None) or []
    assert third == rounded(third, dtype) != [1 / 3]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", range(5))
def test_z15_one_loss_that_is_not_finite_skips_the_update(bad: float, place: int) -> None:
    losses = [1.0, 2.0, 3.0, 4.0, 5.0]
    losses[place] = bad
    chosen = config(estimator="one_and_half")
    assert projected_gradients(chosen, losses[:2], losses[2:4], losses[4]) is None


def test_z15_a_gradient_beyond_the_log_skips_the_update() -> None:
    assert projected_gradients(config(log_dtype="float16"), [1e9], [0.0], None) is None
    assert projected_gradients(config(), [1e308], [-1e308], None) is None


@pytest.mark.parametrize(
    ("start", "forth", "back", "expected"),
    [
        (3.0, 1.0, 2.0, 1),
        (3.0, 2.0, 1.0, -1),
        (1.0, 2.0, 3.0, 0),
        (1.0, 1.0, 3.0, 1),  # ties favour the move
        (1.0, 3.0, 1.0, -1),
        (1.0, 1.0, 1.0, 1),  # and of the moves, the estimate's
        (3.0, NAN, 2.0, -1),
        (3.0, NAN, 4.0, 0),
        (3.0, -INF, 2.0, -1),
        (NAN, 1.0, 2.0, 0),
    ],
)
def test_z18_the_lowest_of_three_is_kept(
    start: float, forth: float, back: float, expected: int
) -> None:
    assert conservative_choice(start, forth, back) == expected


def quadratic(dim: int) -> tuple[Tensor, Tensor]:
    """Hessian and point of L(x) = 1/2 x'Hx, of fp64."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    return root @ root.t() / dim, torch.randn(dim, dtype=torch.float64, generator=generator)


def estimates(loss, point: Tensor, z: Tensor, eps: float, estimator: str = "two_side") -> Tensor:
    """Return g z of every direction, by the estimator's own code. (count, dim)"""
    plus, minus = loss(point + eps * z).tolist(), loss(point - eps * z).tolist()
    base = loss(point[None]).item()
    chosen = ZerothOrderConfig(eps=eps, estimator=estimator)
    one_sided = estimator == "one_side"
    found = projected_gradients(
        chosen, plus, None if one_sided else minus, None if estimator == "two_side" else base
    )
    return torch.tensor(found, dtype=torch.float64)[:, None] * z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-3, 1.0, 30.0])
def test_z1_the_mean_is_the_gradient_of_a_quadratic_at_any_eps(kind: str, eps: float) -> None:
    """Variance of a coordinate: G + g_i^2 for normal z, G - g_i^2 for +-1, with G = |g|^2."""
    dim, count = 32, 100_000
    hessian, point = quadratic(dim)
    gradient = hessian @ point
    found = estimates(
        lambda x: ((x @ hessian) * x).sum(1) / 2, point, directions(count, dim, kind), eps
    )
    square = gradient.square().sum()
    sign = -1 if kind == "rademacher" else 1
    error = ((square + sign * gradient.square()) / count).sqrt()
    assert float(((found.mean(0) - gradient) / error).abs().max()) < 4.5


@pytest.mark.parametrize(("kind", "extra"), [("rademacher", 0), ("gaussian_table", 2)])
def test_z2_the_second_moment_grows_with_the_dimension(kind: str, extra: int) -> None:
    """E |g^|^2 / |g|^2 = d for +-1, d + 2 for normals; with a mask d counts the trained entries."""
    dim, count = 32, 200_000
    gradient = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = directions(count, dim, kind)
    for trained in (dim, 8):
        masked = z * (torch.arange(dim) < trained)
        found = estimates(lambda x: x @ gradient, gradient, masked, 1e-2)
        ratio = found.square().sum(1).mean() / gradient[:trained].square().sum()
        assert float(ratio) == pytest.approx(trained + extra, rel=0.02)


def test_z2_queries_divide_the_noise() -> None:
    """(d + n + 1) / n for the mean of n normal directions."""
    dim, queries = 32, 4
    gradient = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = directions(200_000, dim, "gaussian_table")
    found = estimates(lambda x: x @ gradient, gradient, z, 1e-2)
    means = found.view(-1, queries, dim).mean(1)
    ratio = means.square().sum(1).mean() / gradient.square().sum()
    assert float(ratio) == pytest.approx((dim + queries + 1) / queries, rel=0.02)


def test_z3_the_bias_falls_fourfold_when_eps_halves() -> None:
    """L = sum x^3 / 6: two-sided E[g z] = x^2 / 2 + eps^2 E[sum z^3 z_i] / 6, here for +-1.

    Both steps see the same directions, and all of them, so nothing is left to chance.
    """
    dim = 10
    z = 2.0 * (torch.arange(2**dim)[:, None] >> torch.arange(dim) & 1).double() - 1
    point = torch.linspace(0.5, 1.5, dim, dtype=torch.float64)

    def bias(eps: float, estimator: str) -> float:
        found = estimates(lambda x: x.pow(3).sum(1) / 6, point, z, eps, estimator)
        return float((found.mean(0) - point.square() / 2).norm())

    assert bias(0.4, "two_side") / bias(0.2, "two_side") == pytest.approx(4, abs=0.5)
    # the one-sided estimate's second-order term is even in z, and vanishes in the mean as well
    assert bias(0.4, "one_side") / bias(0.2, "one_side") == pytest.approx(4, abs=0.5)
