"""SpIEL: sparse iterative efficient learning (Ansell et al., arXiv 2401.16405).

theta = theta_0 + scatter(delta, idx): k deltas are trained by Adam (AG) or SM3 (MA); every S
updates the smallest are dropped, which returns those weights to their pre-trained value, and as
many are grown where the accumulated gradient (AG) or the product of SM3's row and column
accumulators (MA) is largest. Unlike the authors' code, candidates leave out active positions,
windows are all equally long, seeds and counters are right under gradient accumulation and in
bfloat16, and drop, merge and resume are exact; `reference=True` keeps their choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftConfig, PeftType
from torch import Tensor
from torch.nn.functional import pad

from sft.adapters.config import SparseConfig, is_whole, require
from sft.adapters.deltas.layer import DeltaLayer
from sft.adapters.deltas.reselection import Reselection, drop_and_grow, drop_and_grow_by_product
from sft.adapters.deltas.schedule import Schedule
from sft.adapters.deltas.tuner import DeltaTuner
from sft.adapters.deltas.window import Window, share_updates
from sft.adapters.dynamics import Accumulators, Dynamics, SupportChange
from sft.adapters.gathered import gathered
from sft.adapters.layer import SparseLayer
from sft.adapters.ranks import ALONE, Ranks
from sft.adapters.select import seeded

GROWTHS = ("gradient", "momentum", "none")
POOLS = ("micro_batch", "update")


@dataclass
class SpielConfig(SparseConfig):
    """Configuration of SpIEL; with growth="none" of a static sparse delta.

    Args:
        growth: "gradient" (SpIEL-AG), "momentum" (SpIEL-MA, needs SM3) or "none" (static support).
        reselect_every: optimizer updates between reselections.
        window: updates of gradients accumulated before one, 1 <= window <= reselect_every.
        replace_fraction: share of the deltas replaced, at the start of the schedule.
        replace_schedule: "linear" or "cosine" decay of that share.
        first_full: replace all deltas at the first reselection. By default where the start is
            random, and so a placeholder. Never where training goes on from trained deltas.
        stop_fraction: no reselection after this share of the run.
        candidates_from: "micro_batch" chooses candidates by the first backward pass of a window;
            "update" by its first whole update, which makes them independent of gradient
            accumulation and holds a dense gradient of the targets during that update.
        num_weights_by_module: number of weights of each target by its full name, in place of a
            budget; their sum is `num_weights` then. `sft compose` writes it.
    """

    growth: str = "gradient"
    reselect_every: int = 20
    window: int = 5
    replace_fraction: float = 0.2
    replace_schedule: str = "linear"
    first_full: bool | None = None
    stop_fraction: float = 1.0
    candidates_from: str = "micro_batch"
    num_weights_by_module: dict[str, int] | None = None

    def __post_init__(self) -> None:
        if self.num_weights_by_module is not None:
            self.num_weights = self._total(self.num_weights_by_module)
        super().__post_init__()
        self.peft_type = PeftType("SPIEL")
        require("growth", self.growth, self.growth in GROWTHS, ", ".join(GROWTHS))
        pool = self.candidates_from
        require("candidates_from", pool, pool in POOLS, " or ".join(POOLS))
        if self.first_full is None:
            self.first_full = self.selection == "random"
        fits = self.growth != "momentum" or self.optimizer in ("auto", "sm3")
        require("optimizer", self.optimizer, fits, "sm3 (or auto) with growth='momentum'")
        self.schedule(total=1)

    def _total(self, counts: dict[str, int]) -> int:
        """Return the sum of the modules' counts.

        Raises:
            ValueError: one is no count, or the budget says otherwise.
        """
        key, known = "num_weights_by_module", bool(counts)
        require(key, counts, known and all(map(is_whole, counts.values())), "whole numbers by name")
        require(key, min(counts.values()), min(counts.values()) >= 1, "at least 1 a module")
        total = sum(counts.values())
        ok = self.num_weights in (None, total)
        require("num_weights", self.num_weights, ok, f"{total}, the sum of {key}; or leave it out")
        return total

    @property
    def suited_optimizer(self) -> str:
        """SM3 where its accumulators decide what is grown."""
        return "sm3" if self.growth == "momentum" else "adamw"

    @property
    def backward_only(self) -> dict[str, str]:
        """Settings that need gradients, and what to set instead: a support moves by them."""
        return {} if self.growth == "none" else {"growth": "none"}

    def schedule(self, total: int) -> Schedule:
        """Return when the support changes in a run of `total` updates."""
        return Schedule(
            every=self.reselect_every,
            window=self.window,
            fraction=self.replace_fraction,
            policy=self.replace_schedule,
            first_full=bool(self.first_full),
            stop_fraction=self.stop_fraction,
            total=total,
            reference=self.reference,
        )


class SpielModel(DeltaTuner):
    """PEFT tuner of SpIEL."""

    def counts(self, config: Any, targets: dict[str, SparseLayer]) -> dict[str, int]:
        """Return the number of weights of each target, as given or as the budget's share."""
        given: dict[str, int] | None = config.num_weights_by_module
        if given is None:
            return super().counts(config, targets)
        odd = sorted(given.keys() ^ targets.keys())
        if odd:
            raise ValueError(
                f"num_weights_by_module: {odd[0]!r} is in only one of it and target_modules; name "
                "the same modules in both"
            )
        large = [name for name, k in given.items() if k > math.prod(targets[name].shape)]
        if large:
            raise ValueError(
                f"num_weights_by_module: got {given[large[0]]} for {large[0]!r}, which has "
                f"{math.prod(targets[large[0]].shape)} weights; give at most as many"
            )
        return given

    def dynamics(self, adapter_name: str, total_steps: int) -> Dynamics | None:
        """Return the driver of drop and grow, or None with growth="none"."""
        config: SpielConfig = self.peft_config[adapter_name]
        if config.growth == "none":
            return None
        layers, schedule = self.adapted_layers(adapter_name), config.schedule(total_steps)
        if any(bool(layer.delta_values[adapter_name].any()) for layer in layers.values()):
            schedule = replace(schedule, first_full=False)
        kind = GradientGrowth if config.growth == "gradient" else MomentumGrowth
        return kind(layers, adapter_name, config, schedule)


@dataclass(eq=False)
class _Growth:
    """What both kinds of growth share."""

    layers: dict[str, DeltaLayer]
    adapter: str
    config: SpielConfig
    schedule: Schedule

    reads_gradients = False
    reads_accumulators = False
    one_process: str | None = None
    ranks: Ranks = ALONE

    def before_update(self, step: int, micro_batches: int) -> None:
        """Nothing to prepare."""

    def after_gradients(self, scale: float) -> None:
        """Nothing to take in."""

    def metrics(self) -> dict[str, float]:
        """Nothing to show."""
        return {}

    def close(self) -> None:
        """Nothing listens."""

    def state(self) -> dict[str, Tensor]:
        """Return what doesn't follow from the step: whether the run began with a placeholder."""
        return {"first_full": torch.tensor(self.schedule.first_full)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of `state` back."""
        self.schedule = replace(self.schedule, first_full=bool(tensors["first_full"]))

    def _num_replaced(self, layer: DeltaLayer, step: int) -> int:
        return int(layer.delta_values[self.adapter].numel() * self.schedule.replaced(step))

    def _apply(self, layer: DeltaLayer, chosen: Reselection) -> None:
        layer.replace_support(self.adapter, chosen.indices, chosen.source)


@dataclass(eq=False)
class GradientGrowth(_Growth):
    """SpIEL-AG: grow where the gradient accumulated over a window is largest."""

    reads_gradients = True
    windows: dict[str, Window] = field(default_factory=dict)

    def before_update(self, step: int, micro_batches: int) -> None:
        """Open the windows if update `step + 1` is the first of one."""
        if self.schedule.opens_before(step + 1):
            self._open(whole=self.config.candidates_from == "update" and micro_batches > 1)

    def _open(self, *, whole: bool) -> None:
        for name, layer in self.layers.items():
            self.windows[name] = Window(
                layer.site(self.adapter),
                include_active=self.config.reference,
                whole_update=whole,
                name=name,
                ranks=self.ranks,
            )

    def after_gradients(self, scale: float) -> None:
        """Fold the gradients of one update into the open windows."""
        if scale != 0:
            share_updates(list(self.windows.values()), self.ranks)
        for window in self.windows.values():
            window.close_update(scale)

    def after_update(self, step: int, accumulators: Accumulators) -> list[SupportChange]:
        """Drop and grow in every layer if a window ends here."""
        if not self.schedule.reselects_after(step):
            return []
        changes = []
        for name, window in self.windows.items():
            window.close()
            if window.updates:
                changes.append(self._reselect(name, window, step))
        self.windows = {}
        return changes

    def _reselect(self, name: str, window: Window, step: int) -> SupportChange:
        assert window.total is not None and window.total_square is not None
        layer = self.layers[name]
        values = layer.delta_values[self.adapter]
        with gathered([values]):
            chosen = drop_and_grow(
                layer.delta_indices[self.adapter],
                layer.delta_values[self.adapter].detach(),
                window.candidates,
                window.total,
                self._num_replaced(layer, step),
            )
            self._apply(layer, chosen)
        # a kept slot is candidate -1 and reads the padding: a full support has no candidates
        total, total_square = pad(window.total, (0, 1)), pad(window.total_square, (0, 1))
        return SupportChange(
            name=name,
            parameter=values,
            source=chosen.source,
            mean_grad=total[chosen.candidate] / window.updates,
            mean_square=total_square[chosen.candidate] / window.updates,
            updates=window.updates,
        )

    def close(self) -> None:
        """Close the windows that are open."""
        for window in self.windows.values():
            window.close()

    def state(self) -> dict[str, Tensor]:
        """Return the open windows' tensors as `module/part`, and what every growth keeps."""
        return super().state() | {
            f"{name}/{part}": tensor
            for name, window in self.windows.items()
            for part, tensor in window.state().items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Reopen the windows that were open."""
        super().load_state(tensors)
        if not any("/" in name for name in tensors):
            return
        self._open(whole=self.config.candidates_from == "update")
        for name, window in self.windows.items():
            start = f"{name}/"
            parts = {key[len(start) :]: t for key, t in tensors.items() if key.startswith(start)}
            window.load_state(parts)


class MomentumGrowth(_Growth):
    """SpIEL-MA: grow where the product of SM3's row and column accumulators is largest."""

    reads_accumulators = True

    def after_update(self, step: int, accumulators: Accumulators) -> list[SupportChange]:
        """Drop and grow in every layer if a reselection is due."""
        if not self.schedule.reselects_after(step):
            return []
        changes = []
        for name, layer in self.layers.items():
            change = self._reselect(name, layer, step, accumulators)
            if change is not None:
                changes.append(change)
        return changes

    def _reselect(
        self, name: str, layer: DeltaLayer, step: int, accumulators: Accumulators
    ) -> SupportChange | None:
        values = layer.delta_values[self.adapter]
        statistics = accumulators(values)
        if statistics is None:
            return None
        with gathered([values]):
            chosen = drop_and_grow_by_product(
                layer.delta_indices[self.adapter],
                layer.delta_values[self.adapter].detach(),
                *statistics,
                self._num_replaced(layer, step),
                seeded(self.config.seed, "grow", name, step),
            )
            self._apply(layer, chosen)
        return SupportChange(name=name, parameter=values, source=chosen.source)


Config: type[PeftConfig] = SpielConfig
Model = SpielModel
