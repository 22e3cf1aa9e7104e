"""What a zeroth-order run is asked to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

CHOICES = {
    "estimator": ("two_side", "one_side", "one_and_half"),
    "update": ("sgd", "sign", "momentum", "adam", "conservative"),
    "noise": ("rademacher", "gaussian_table", "gaussian"),
    "mode": ("exact", "inplace", "reference"),
    "mask": ("magnitude", "random"),
    "parallel": ("data", "queries"),
    "log_dtype": ("float32", "float16"),
}
OBJECTIVES = ("loss", "accuracy", "f1")

Objective = Callable[[Any, dict[str, Any]], Any]


@dataclass(kw_only=True)
class ZerothOrderConfig:
    """Train by forward passes alone: along a random direction z the loss is differenced.

        g = (L(w + eps z) - L(w - eps z)) / (2 eps),     w <- w - lr (g z + weight_decay w)

    The learning rate, its schedule and the weight decay are those of `TrainingArguments`. What is
    trained is what requires a gradient: a whole model (MeZO), the small weights of it
    (`sparsity`, Sparse MeZO), or any PEFT adapter.

    Args:
        eps: size of the perturbation, > 0; 1e-3 suits whole models, 1e-2 LoRA.
        queries: directions a step; their estimates are averaged.
        estimator: two_side as above; one_side (L(w + eps z) - L(w)) / eps, which shares L(w)
            among the queries; one_and_half, two-sided with each query weighted by its curvature.
        update: sgd; sign, of each projected gradient; momentum or adam, which keep fp32 state of
            the trained weights; conservative, which keeps the best of w, w - u and w + u.
        noise: rademacher, z = +-1; gaussian_table, normals of 8 significant bits; gaussian, by
            Box-Muller, repeatable on one kind of device only.
        mode: exact, weights are never modified to evaluate a loss; inplace, they are, without any
            extra memory and with rounding drift; reference, the sequence of MeZO's authors.
        sparsity: share of each tensor that is left untouched, in [0, 1); 0 trains all of it.
        mask: which part is trained: magnitude, the smallest weights, by a threshold that is fixed
            at the start; random, by counter noise.
        clip: bound on the absolute projected gradient, or None.
        momentum: for update="momentum": how much of the sum of past estimates each update keeps;
            a sum as in torch's SGD, so steps grow to 1 / (1 - momentum) times their size.
        betas: decay rates of Adam's two moments.
        objective: what is lowered: "loss", the trainer's own; "accuracy" or "f1", one minus it;
            or a function (model, inputs) -> number, which need not be differentiable.
        parallel: several processes share the directions and split the batch ("data"), or take
            directions of their own ("queries").
        dropout: leave dropout on; both sides see the same masks. The authors evaluate without.
        divergence: stop when the mean loss of 20 updates is this much above that of the first
            20; None never stops.
        max_skipped: stop after so many updates in a row whose loss was not finite.
        dense_state: allow momentum and Adam to keep state of more than a tenth of the model.
        log_dtype: precision of the logged projected gradients; they are rounded before use.
        seed: of the directions; None takes that of the `TrainingArguments`.

    Raises:
        ValueError: a field is out of range.

    Papers: MeZO, arXiv 2305.17333, Algorithm 1; Sparse MeZO, arXiv 2402.15751; the update rules
    are compared in arXiv 2402.11592. Unlike the authors' code, z is +-1 by default, the weights
    are the same bits before and after a loss, and nothing touches the global random state.
    """

    eps: float = 1e-3
    queries: int = 1
    estimator: str = "two_side"
    update: str = "sgd"
    noise: str = "rademacher"
    mode: str = "exact"
    sparsity: float = 0.0
    mask: str = "magnitude"
    clip: float | None = None
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    objective: str | Objective = "loss"
    parallel: str = "data"
    dropout: bool = False
    divergence: float | None = 2.0
    max_skipped: int = 10
    dense_state: bool = False
    log_dtype: str = "float32"
    seed: int | None = None

    def __post_init__(self) -> None:
        for key, allowed in CHOICES.items():
            _require(getattr(self, key) in allowed, key, self, f"one of {', '.join(allowed)}")
        _require(_number(self.eps) and 0 < self.eps < math.inf, "eps", self, "a number > 0")
        _require(_count(self.queries, 1), "queries", self, "an integer >= 1")
        _require(
            _number(self.sparsity) and 0 <= self.sparsity < 1, "sparsity", self,
            "a share in [0, 1); use 0.75 to train the smallest quarter of each tensor",
        )  # fmt: skip
        drawn = self.mask != "random" or round((1 - self.sparsity) * 2**16) > 0
        _require(drawn, "sparsity", self, "up to 1 - 2**-16 with mask='random'")
        for key in ("clip", "divergence"):
            value = getattr(self, key)
            fits = value is None or (_number(value) and 0 < value < math.inf)
            _require(fits, key, self, "a finite number > 0, or null")
        _require(_decay(self.momentum), "momentum", self, "a number in [0, 1)")
        betas: Any = self.betas
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        _require(pair and all(map(_decay, betas)), "betas", self, "two numbers in [0, 1)")
        self.betas = tuple(betas)
        known = callable(self.objective) or self.objective in OBJECTIVES
        _require(known, "objective", self, f"one of {', '.join(OBJECTIVES)}, or a function")
        _require(_count(self.max_skipped, 1), "max_skipped", self, "an integer >= 1")
        _require(self.seed is None or _count(self.seed, 0), "seed", self, "an integer >= 0 or null")
        self._check_mode()

    def _check_mode(self) -> None:
        """Refuse what a mode that writes to the weights cannot do."""
        if self.mode != "exact" and self.sparsity > 0 and self.mask == "magnitude":
            raise ValueError(
                f"mode: got {self.mode!r} with a magnitude mask, which has to be read from "
                "unperturbed weights; use mode='exact' or mask='random'"
            )
        authors = (self.estimator, self.queries, self.update, self.sparsity)
        if self.mode == "reference" and authors != ("two_side", 1, "sgd", 0):
            raise ValueError(
                "mode: 'reference' is the authors' loop, with estimator='two_side', queries=1, "
                "update='sgd' and sparsity=0 alone; use mode='exact' for anything else"
            )

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON takes them; a function by its name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        if callable(self.objective):
            found["objective"] = getattr(self.objective, "__qualname__", repr(self.objective))
        return found | {"betas": list(self.betas)}


def _require(fits: bool, key: str, config: ZerothOrderConfig, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{key}: got {getattr(config, key)!r}, allowed is {allowed}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _decay(value: Any) -> bool:
    return _number(value) and 0 <= value < 1
