"""The proximal step of an l1 penalty, after each step of any torch optimizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sft.kernels.soft_threshold import soft_threshold_many_
from sft.optim.adamw import SparseAdamW
from sft.optim.shards import local

RULES = ("soft", "reference")


class Penalty(Protocol):
    """A penalty strength * norm1(parameters); the strength is read anew at every step."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What is shrunk; each belongs to a group of the optimizer."""

    @property
    def strength(self) -> float:
        """Weight of the penalty, >= 0."""

    @property
    def rule(self) -> str:
        """`soft`, the exact operator, or `reference`, see `reference_threshold`."""

    @property
    def times_lr(self) -> bool:
        """The threshold is lr * strength, as in proximal gradient, not the strength itself."""


def attach(optimizer: torch.optim.Optimizer, penalties: Iterable[Penalty]) -> Shrinking:
    """Apply p <- prox(p, tau) to every penalised parameter after each step of the optimizer.

    tau = lr * strength with the learning rate that the step used (of the group that holds the
    parameter), or the strength itself: proximal gradient with the optimizer's step as the gradient
    step. An update that a loss scaler skipped shrinks nothing. `SparseAdamW` shrinks what it steps
    in the same pass, to the same bits.

    Args:
        optimizer: any torch optimizer, wrapped by accelerate or not.
        penalties: their strengths may change between steps.

    Returns:
        a handle; `remove()` ends the shrinking.

    Raises:
        ValueError: a penalised parameter is none of the optimizer's, or a rule is unknown.
    """
    inner = _stepping(optimizer)
    found = list(penalties)
    known = _groups(inner)
    check_rules(found)
    for penalty in found:
        if any(id(parameter) not in known for parameter in penalty.parameters):
            raise ValueError(
                "penalties: got a parameter that the optimizer does not hold; create the optimizer "
                "after the adapter, from the parameters that require a gradient"
            )
    return Shrinking(inner, found)


class Shrinking:
    """Shrinks after each step until it is removed; see `attach`."""

    def __init__(self, optimizer: torch.optim.Optimizer, penalties: Sequence[Penalty]) -> None:
        self._optimizer = optimizer
        self._penalties = penalties
        self._shrunk: set[int] = set()
        count = Counter(id(p) for penalty in penalties for p in penalty.parameters)
        self._only = {
            id(p): penalty for penalty in penalties for p in penalty.parameters if count[id(p)] == 1
        }
        if isinstance(optimizer, SparseAdamW):
            optimizer.threshold = self._in_step
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """End the shrinking."""
        self._handle.remove()
        if isinstance(self._optimizer, SparseAdamW):
            self._optimizer.threshold = None

    def _in_step(self, parameter: Tensor, lr: float) -> float:
        """Return what a step is to shrink this parameter by itself, 0 for not at all."""
        penalty = self._only.get(id(parameter))
        if penalty is None or penalty.rule != "soft":
            return 0.0
        self._shrunk.add(id(parameter))
        return lr * penalty.strength if penalty.times_lr else penalty.strength

    def _after_step(self, stepped: torch.optim.Optimizer, *_: Any) -> None:
        proximal_step_(stepped, self._penalties, done=self._shrunk)
        self._shrunk.clear()


@torch.no_grad()
def proximal_step_(
    optimizer: torch.optim.Optimizer, penalties: Iterable[Penalty], done: Container[int] = ()
) -> None:
    """Shrink the parameters of each penalty by the learning rates that stand in the groups.

    Args:
        optimizer: has the parameters in its groups.
        penalties: see `attach`.
        done: ids of parameters that were shrunk already.
    """
    groups = _groups(optimizer)
    for penalty in penalties:
        # by learning rate: layer-wise rates may have put the parameters into several groups
        batches: dict[int, tuple[Any, list[Tensor]]] = {}
        for parameter in penalty.parameters:
            if id(parameter) in done:
                continue
            group = groups[id(parameter)]
            batches.setdefault(id(group), (group["lr"], []))[1].append(parameter)
        for lr, parameters in batches.values():
            shrink_(optimizer, lr, parameters, penalty)


def shrink_(
    optimizer: torch.optim.Optimizer,
    lr: float | Tensor,
    parameters: Sequence[Tensor],
    penalty: Penalty,
) -> None:
    """Shrink tensors that a step has just moved at one learning rate, whatever they are part of.

    Args:
        optimizer: made the step.
        lr: that it was made with.
        parameters: written.
        penalty: gives strength and rule.
    """
    rate = lr if penalty.times_lr else 1.0
    tau, factor = _threshold(optimizer, rate, penalty.strength)
    _shrink_(list(parameters), tau, factor, penalty.rule)


def check_rules(penalties: Iterable[Penalty]) -> None:
    """Raise ValueError on a rule that there is not."""
    for penalty in penalties:
        if penalty.rule not in RULES:
            raise ValueError(f"prox: got {penalty.rule!r}, allowed are {', '.join(RULES)}")


def reference_threshold(value: Tensor, tau: float | Tensor) -> Tensor:
    """Return what SoRA's authors compute: three masked statements, one after another.

    v -= tau where v > tau; v += tau where v < -tau; v = 0 where |v| < tau. The last statement sees
    what the first two have shrunk, so the dead zone is 2 tau wide, not tau (but |v| = tau stays).

    Args:
        value: floating, any shape.
        tau: threshold >= 0; a tensor broadcasts.

    Paper: SoRA, arXiv 2311.11696, whose equation is `soft_threshold`; for comparison with its code.
    """
    value = torch.where(value > tau, value - tau, value)
    value = torch.where(value < -tau, value + tau, value)
    return torch.where(value.abs() < tau, torch.zeros_like(value), value)


def _shrink_(parameters: list[Tensor], tau: float, factor: Tensor | None, rule: str) -> None:
    if tau == 0:
        return
    parameters = [local(parameter) for parameter in parameters]
    if rule == "soft":
        soft_threshold_many_(parameters, tau, factor)
        return
    for parameter in parameters:
        bound = tau if factor is None else factor * tau
        parameter.copy_(reference_threshold(parameter, bound))


def _threshold(
    optimizer: torch.optim.Optimizer, lr: float | Tensor, strength: float
) -> tuple[float, Tensor | None]:
    """Return a number and a tensor whose product is the threshold lr * strength.

    The product is 0 for an update that a fused optimizer skipped: the loss scaler tells it so.
    """
    overflow = getattr(optimizer, "found_inf", None)
    applied = 1.0 if overflow is None else 1 - overflow
    # numbers to the one side, tensors, which are not waited for, to the other
    tensors = [value for value in (lr, applied) if isinstance(value, Tensor)]
    numbers = [value for value in (lr, applied) if not isinstance(value, Tensor)]
    factor = math.prod(tensors[1:], start=tensors[0]) if tensors else None
    return math.prod(numbers) * strength, factor


def _stepping(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer whose step fires hooks: below accelerate's, not below per-layer's."""
    while not getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Return the group of each parameter; loading a state replaces the groups."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}
