"""When a support changes, and by how much: SpIEL's schedule (arXiv 2401.16405, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sft.adapters.config import is_whole, require

POLICIES = ("linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Windows of `window` updates that end in a reselection every `every` updates.

    Steps count completed updates, t = 1 .. total. Reselections fall on t = window, window + every,
    window + 2 every, ...; the window before each is exactly `window` updates long.

    Args:
        every: updates between reselections (S).
        window: updates whose gradients are accumulated before one (A), 1 <= A <= S.
        fraction: share p0 of the deltas replaced at t = 0 of the policy, in [0, 1].
        policy: "linear", p = p0 (1 - t/T), or "cosine", p = p0 (1 + cos(pi t/T)) / 2.
        first_full: replace everything at the first reselection.
        stop_fraction: no reselection after this share of the run.
        total: updates of the whole run (T).
        reference: windows open one update early except the first, and the cosine policy has no
            full first step, as in the authors' code.
    """

    every: int
    window: int
    fraction: float
    policy: str
    first_full: bool
    stop_fraction: float
    total: int
    reference: bool = False

    def __post_init__(self) -> None:
        enough = is_whole(self.every) and self.every >= 1
        require("reselect_every", self.every, enough, "a whole number of at least 1")
        # the authors' later windows are one update longer, and must not reach into the one before
        longest = self.every - 1 if self.reference else self.every
        inside = is_whole(self.window) and 1 <= self.window <= longest
        require("window", self.window, inside, f"1 to {self._longest_is} ({longest})")
        require("replace_fraction", self.fraction, 0 <= self.fraction <= 1, "0 to 1")
        require("replace_schedule", self.policy, self.policy in POLICIES, " or ".join(POLICIES))
        require("stop_fraction", self.stop_fraction, 0 <= self.stop_fraction <= 1, "0 to 1")

    @property
    def _longest_is(self) -> str:
        return "reselect_every - 1 with reference=True" if self.reference else "reselect_every"

    def reselects_after(self, step: int) -> bool:
        """Tell whether the support changes after update `step`."""
        due = step >= self.window and (step - self.window) % self.every == 0
        return due and step <= self.stop_fraction * self.total and step < self.total

    def opens_before(self, step: int) -> bool:
        """Tell whether update `step` is the first of a window."""
        end = step + self.window - 1
        if self.reference and step != 1:
            end += 1
        return self.reselects_after(end)

    def replaced(self, step: int) -> float:
        """Share of the deltas replaced at the reselection after update `step`."""
        if self.first_full and step == self.window and not self._cosine_reference:
            return 1.0
        total = max(1, self.total)
        if self.policy == "linear":
            # multiplied first: 1 - t/T rounds, and k * p would fall below a whole number
            return self.fraction * (total - step) / total
        return self.fraction * (1 + math.cos(math.pi * step / total)) / 2

    @property
    def _cosine_reference(self) -> bool:
        return self.reference and self.policy == "cosine"
