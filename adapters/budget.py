"""How many weights of each matrix are trained: exact arithmetic over the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of trained weights; exactly one field is set.

    Args:
        density: share of the targeted weights, in (0, 1].
        num_weights: number of weights, at least one for each targeted matrix.
        match_lora_rank: as many weights as LoRA of this rank trains on the same matrices.

    Raises:
        ValueError: not exactly one field is set, or one is out of range.
    """

    density: float | None = None
    num_weights: int | None = None
    match_lora_rank: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            found = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
            raise ValueError(
                f"density, num_weights, match_lora_rank: got {found}; set exactly one of them"
            )
        number = isinstance(self.density, (int, float)) and not isinstance(self.density, bool)
        if self.density is not None and not (number and 0 < self.density <= 1):
            raise ValueError(f"density: got {self.density!r}, allowed is 0 < density <= 1")
        for name in ("num_weights", "match_lora_rank"):
            value = given.get(name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= 1):
                raise ValueError(f"{name}: got {value!r}, allowed is a whole number of at least 1")

    def total(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Number of weights to train in matrices of these (rows, cols)."""
        numel = sum(rows * cols for rows, cols in shapes.values())
        if self.num_weights is not None:
            total = self.num_weights
        elif self.match_lora_rank is not None:
            total = self.match_lora_rank * sum(rows + cols for rows, cols in shapes.values())
        else:
            assert self.density is not None
            total = round(self.density * numel)
        if total > numel:
            raise ValueError(f"{self}: asks for {total:,} weights, the targets hold {numel:,}")
        return total

    def __str__(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if v is not None)


def allocate(total: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Share `total` out in proportion to size, by largest remainder: the sum is exact.

    Args:
        total: number of weights to train.
        shapes: (rows, cols) by matrix name.

    Returns:
        Count by name, each in [1, rows * cols]. Equal remainders go to the earlier name.

    Raises:
        ValueError: a matrix would get no weight. SpIEL's authors (arXiv 2401.16405) round down and
            let it happen silently.
    """
    numel = {name: rows * cols for name, (rows, cols) in shapes.items()}
    whole = sum(numel.values())
    exact = {name: Fraction(total * size, whole) for name, size in numel.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise ValueError(
            f"density: {total:,} weights over {whole:,} leave none for {len(empty)} matrices "
            f"(first: {empty[0]}, {numel[empty[0]]:,} weights); raise the budget or exclude them"
        )
    return counts


def allocate_reference(
    density: float, model_numel: int, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Share out as SpIEL's authors do: density is of the whole model, each count is rounded down.

    N = int(density * P), k_m = int(N * n_m / n) over all parameters P and targeted weights n.
    """
    total = int(density * model_numel)
    whole = sum(rows * cols for rows, cols in shapes.values())
    if total > whole:
        raise ValueError(
            f"density: {density} of the model's {model_numel:,} parameters asks for {total:,} "
            f"weights, the targets hold {whole:,}"
        )
    counts = {name: total * rows * cols // whole for name, (rows, cols) in shapes.items()}
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise ValueError(f"density: {density} leaves no weight for {empty[0]}; raise it")
    return counts
