"""The `expected:` section: what a recipe promises, and whether a run kept it."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping

from pydantic import Field, field_validator

from sft.recipe.section import Section

_BOUND = re.compile(r"(<=|>=|<|>)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)$")
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


class ExpectedSpec(Section):
    """What a run of the recipe ends with and takes."""

    metrics: dict[str, str] = Field(
        default_factory=dict, description="bounds on metrics after training, such as '<= 0.55'"
    )
    minutes: float | None = Field(default=None, gt=0, description="the whole run")
    memory_gb: float | None = Field(default=None, gt=0, description="at its peak, on one device")
    machine: str = Field(default="two CPU cores", description="that takes so long")
    source: str | None = Field(
        default=None, description="of figures that were published, not measured with this recipe"
    )

    @field_validator("metrics")
    @classmethod
    def _are_bounds(cls, metrics: dict[str, str]) -> dict[str, str]:
        for name, bound in metrics.items():
            if not _BOUND.match(bound):
                raise ValueError(f"{name}: got {bound!r}; expected a bound such as '<= 0.55'")
        return metrics

    def line(self) -> str:
        """Say in a line what is expected."""
        parts = [f"{name} {bound}" for name, bound in self.metrics.items()]
        parts += [f"about {self.minutes:g} min on {self.machine}"] if self.minutes else []
        parts += [f"{self.memory_gb:g} GB"] if self.memory_gb else []
        return "; ".join(parts)


def broken(metrics: Mapping[str, str], found: Mapping[str, float]) -> list[str]:
    """Return a line for each bound that a run did not keep.

    Args:
        metrics: of the section.
        found: by a run, after training.
    """
    return [
        f"expected {name} {bound}, got {found.get(name, float('nan')):.4g}"
        for name, bound in metrics.items()
        if name not in found or not _keeps(bound, found[name])
    ]


def _keeps(bound: str, value: float) -> bool:
    parts = _BOUND.match(bound)
    assert parts is not None  # checked when the recipe was read
    return bool(_COMPARE[parts[1]](value, float(parts[2])))
