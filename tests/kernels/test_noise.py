"""Noise against its layout, one weight at a time; its statistics; its independence of the cut."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from sft.kernels.noise import (
    KINDS,
    TILE,
    Run,
    noise,
    noise_at,
    noise_reference,
    normal_table,
    rounded,
    tile_words,
)

KEY, PARAMETER = 2**63 + 12345, 2**32 - 7
WHERE = [0, 1, 127, 128, 2047, 2048, TILE - 1, TILE, 3 * TILE + 77]


MANY = 2**18


@functools.cache
def many(kind: str) -> torch.Tensor:
    """Noise of many weights, drawn once for all statistics."""
    return noise(1, 2, MANY, kind=kind).double()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_weight_follows_the_layout(kind: str) -> None:
    z = noise(KEY, PARAMETER, max(WHERE) + 1, kind=kind)
    assert (z.dtype, z.shape) == (torch.float32, (max(WHERE) + 1,))
    expected = [noise_reference(KEY, PARAMETER, index, kind=kind) for index in WHERE]
    off = (z[WHERE].double() - torch.tensor(expected, dtype=torch.float64)).abs().max()
    # the logarithm and the angle are float32 in one, float64 in the other
    assert off <= (2e-6 if kind == "gaussian" else 0)


@pytest.mark.parametrize("start", [1, 4095, 4096, 10_001, 2**31 - 5, 2**43 + 3])
def test_a_part_is_a_part_of_the_whole(kind: str, start: int) -> None:
    """Z6: shards, and indices beyond 32 bits in weights and in counters."""
    part = noise(KEY, PARAMETER, 5000, kind=kind, start=start)
    expected = noise_reference(KEY, PARAMETER, start + 4321, kind=kind)
    assert part[4321].item() == pytest.approx(expected, abs=2e-6)
    if start < 2**20:
        assert torch.equal(part, noise(KEY, PARAMETER, start + 5000, kind=kind)[start:])


def test_any_subset_in_any_order(kind: str) -> None:
    """Z6."""
    whole = noise(KEY, PARAMETER, 3 * TILE, kind=kind)
    positions = torch.randperm(3 * TILE, generator=torch.Generator().manual_seed(0))[:600]
    found = noise_at(KEY, PARAMETER, positions.view(20, 30), kind=kind)
    assert torch.equal(found, whole[positions].view(20, 30))


def test_many_parameters_at_once_as_one_by_one(kind: str) -> None:
    runs = [Run(3, 0, 2), Run(9, 5, 1), Run(3, 2, 130)]
    together = tile_words(KEY, runs, kind)
    alone = torch.cat([tile_words(KEY, [run], kind) for run in runs])
    assert torch.equal(together, alone)


def test_mean_and_variance(kind: str) -> None:
    """Z7: both within 4 standard errors."""
    z = many(kind)
    kurtosis = 1.0 if kind == "rademacher" else 3.0
    assert abs(z.mean()) < 4 / math.sqrt(MANY)
    assert abs(z.square().mean() - 1) <= 4 * math.sqrt((kurtosis - 1) / MANY)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 32, 128, 2048, 4096])
def test_no_correlation_between_neighbours(kind: str, lag: int) -> None:
    """Z7."""
    z = many(kind)
    assert abs((z[lag:] * z[:-lag]).mean()) < 4 / math.sqrt(MANY)


@pytest.mark.parametrize(
    ("key", "parameter", "start"),
    [(2, 2, 0), (1 + 2**32, 2, 0), (1, 3, 0), (1, 2 + 2**31, 0), (1, 2, 2**20), (1, 2, 2**40)],
    ids=["key", "high half of the key", "parameter", "its top bit", "shard", "far shard"],
)
def test_no_correlation_between_draws(kind: str, key: int, parameter: int, start: int) -> None:
    """Z7: steps, queries, tensors and shards have noise of their own."""
    other = noise(key, parameter, MANY, kind=kind, start=start).double()
    assert abs((many(kind) * other).mean()) < 4 / math.sqrt(MANY)


def test_normals_are_normal() -> None:
    """Quantiles of the two normals within the Kolmogorov bound at p = 1e-6."""
    for kind in ("gaussian_table", "gaussian"):
        z = noise(5, 6, count := 2**18, kind=kind).double().sort().values
        # a value of the table stands for a cell: at most 2^-9 wide where 8 bits are coarsest
        ranks = (torch.arange(count) + 0.5) / count
        off = (torch.special.ndtr(z) - ranks).abs().max().item()
        assert off < math.sqrt(math.log(2 / 1e-6) / 2 / count) + 2**-9


def test_products_with_the_table_are_exact() -> None:
    table = normal_table()
    assert torch.equal(table, -table.flip(0))
    for c in (1e-3, 3.3333e-7, 12345.678):
        used = rounded(c, "gaussian_table")
        assert abs(used - c) <= abs(c) * 2**-16
        assert torch.equal((table * used).double(), table.double() * used)


def test_no_value_of_the_table_is_near_a_rounding_boundary() -> None:
    """Libraries differ in last bits of the quantile function; the table must not."""
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    mantissa, _ = torch.frexp(torch.special.ndtri(middles))
    fraction = (mantissa.abs() * 256).frac()
    assert (fraction - 0.5).abs().min() > 1e-6


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise: got 'normal', allowed is one of rademacher,"):
        noise(1, 2, 3, kind="normal")


def test_the_table_is_exact_in_half_the_bytes() -> None:
    """What a GPU looks up is bfloat16."""
    assert torch.equal(normal_table().to(torch.bfloat16).float(), normal_table())
