"""The zeroth-order optimizer: applies projected gradients, and logs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from sft.kernels.displace import displace
from sft.optim.base import ExactOptimizer
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.estimate import rounded
from sft.optim.zeroth_order.header import (
    check_header,
    describe,
    difference,
    mask_of,
    other_threshold,
)
from sft.optim.zeroth_order.keys import step_key
from sft.optim.zeroth_order.log import ZerothOrderLog
from sft.optim.zeroth_order.moments import moment_step_
from sft.optim.zeroth_order.reference import ReferenceMode
from sft.optim.zeroth_order.rules import STATEFUL, coefficients, decay_of, joined
from sft.optim.zeroth_order.trained import Trained

ENTRY = "zeroth_order"  # of the state_dict
SHARE = 0.1  # of the model that momentum and Adam may keep state of, unless `dense_state`

_Pass = dict[tuple[float, ...], list[tuple[Trained, float]]]


class ZerothOrderOptimizer(ExactOptimizer):
    """Moves the trained set along directions of noise, by projected gradients that it is told.

        optimizer.propose(gradients)  # of the directions optimizer.keys(n), in their order
        optimizer.step()              # w <- w - (sum_q c_q z_q + lr weight_decay w), and a log row

    There are no gradient tensors, and no state but for momentum and Adam. Learning-rate schedules,
    step hooks and checkpoints work as with any optimizer. Fed again from its log, it repeats the
    run bit for bit.

    Args:
        groups: parameter groups with `lr` and, if any, `weight_decay`; lr may be a tensor.
        trained: the trained set: every parameter of the groups, and no other. The masks of this
            very list are replaced when a state is loaded.
        config: rule, noise, queries, and precision of the log.
        seed: of the run's directions.
        queries: directions an update over all processes, when not `config.queries`.
        model_size: number of parameters of the model, which bounds the state of momentum and Adam.

    Attributes:
        log: of all updates so far.
        updates: their number; skipped: how many of them were skipped.
        moved: where the weights stand, when they don't stand at w: draws of `displace`, which the
            next step takes back in the pass of its update.
        reference: applies the updates of mode="reference", by z of its own.
        found_inf: 1.0 after a skipped update, else 0.0; what an AMP scaler tells fused optimizers.

    Raises:
        ValueError: an option is out of range, or the parts don't fit each other.
    """

    per_entry: ClassVar[tuple[str, ...]] = tuple(n for names in STATEFUL.values() for n in names)

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        trained: Sequence[Trained],
        config: ZerothOrderConfig,
        seed: int,
        *,
        queries: int | None = None,
        model_size: int | None = None,
    ) -> None:
        self.trained = trained if isinstance(trained, list) else list(trained)
        self.config, self.seed = config, seed
        self.queries = queries or config.queries
        super().__init__(list(groups), {"weight_decay": 0.0})
        self.skipped = 0
        self.moved: Sequence[tuple[int, float]] = ()
        self.found_inf = 0.0
        self.reference = ReferenceMode(self.trained, config.eps)
        self._pending: list[float] | None = None
        self._proposed = False
        self._check_fit()
        _check_rule(config, self.param_groups)
        _check_size(config, self.trained, model_size)
        header = describe(config, self.param_groups, self.trained, seed=seed, queries=self.queries)
        self.log = ZerothOrderLog(header)

    @property
    def updates(self) -> int:
        """Number of updates so far, with those that were skipped."""
        return len(self.log)

    def keys(self, count: int) -> list[int]:
        """Return the noise keys of the next update's first `count` directions."""
        return [step_key(self.seed, self.updates, query) for query in range(count)]

    def coefficients(
        self, gradients: Sequence[float], group: Mapping[str, Any] | None = None
    ) -> list[tuple[int, float]]:
        """Return the draws of the update that `gradients` would make, to w - sum_q c_q z_q.

        Args:
            gradients: projected gradient of each direction.
            group: the parameter group; None when all have one learning rate.

        Raises:
            ValueError: no group is named, and their learning rates differ.
        """
        if group is None:
            group = self.param_groups[0]
            rates = sorted({float(g["lr"]) for g in self.param_groups})
            if len(rates) > 1:
                raise ValueError(
                    f"lr: got {', '.join(f'{rate:g}' for rate in rates)} in different groups, "
                    f"update={self.config.update!r} takes one for all"
                )
        numbers = coefficients(gradients, float(group["lr"]), rule=self.config.update)
        return list(zip(self.keys(len(numbers)), numbers, strict=True))

    def propose(self, gradients: Sequence[float] | None) -> None:
        """Say what the next step applies.

        Args:
            gradients: projected gradient of each of `queries` directions; they are rounded to the
                log's precision. None, or one that is not finite, skips the update.

        Raises:
            ValueError: there are more or fewer than `queries`.
        """
        kept = None if gradients is None else rounded(gradients, self.config.log_dtype)
        if kept is not None and len(kept) != self.queries:
            raise ValueError(f"gradients: got {len(kept)}, allowed are {self.queries}, the queries")
        finite = kept is not None and all(map(math.isfinite, kept))
        self._pending, self._proposed = kept if finite else None, True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply what was proposed, and log it; return the closure's loss, if given one.

        A skipped update leaves weights and state alone.

        Raises:
            RuntimeError: nothing was proposed since the last step.
        """
        loss = None if closure is None else closure()
        if not self._proposed:
            raise RuntimeError("step: nothing was proposed; call propose(gradients) before a step")
        gradients, self._pending, self._proposed = self._pending, None, False
        if gradients is None:
            self._displace({(): [(t, 0.0) for t in self.trained]})
        elif self.config.update in STATEFUL:
            self._step_moments(gradients)
        elif self.config.mode == "reference":
            self._step_reference(gradients)
        else:
            self._step_plain(gradients)
        self.moved = ()
        self.skipped += gradients is None
        self.found_inf = float(gradients is None)
        self.log.append(gradients, [float(group["lr"]) for group in self.param_groups])
        return loss

    def _step_plain(self, gradients: Sequence[float]) -> None:
        """Restore, update and decay in one pass over the weights of equal coefficients."""
        passes: _Pass = {}
        for group, members in self._members():
            lr = float(group["lr"])
            numbers = coefficients(gradients, lr, rule=self.config.update)
            decay = decay_of(lr, group["weight_decay"])
            passes.setdefault(tuple(numbers), []).extend((t, decay) for t in members)
        self._displace(passes)

    def _displace(self, passes: _Pass) -> None:
        for numbers, members in passes.items():
            draws = self._way(list(zip(self.keys(len(numbers)), numbers, strict=True)))
            decays = [decay for _, decay in members]
            if not members or not (any(c for _, c in draws) or any(decays)):
                continue
            weights = [t.parameter.data for t, _ in members]
            displace(
                weights,
                [t.id for t, _ in members],
                draws,
                kind=self.config.noise,
                decays=decays if any(decays) else None,
                masks=[t.mask for t, _ in members],
                out=weights,
            )

    def _way(self, draws: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """Return the draws that lead from where the weights stand to where `draws` lead from w."""
        if self.config.noise == "gaussian_table":
            # its coefficients hold 16 bits: a sum would lose the update beside the perturbation
            return draws + [(key, -offset) for key, offset in self.moved]
        return joined(draws, self.moved)

    def _step_moments(self, gradients: Sequence[float]) -> None:
        self._displace({(): [(t, 0.0) for t in self.trained]})
        draws = [
            (key, g / len(gradients))
            for key, g in zip(self.keys(len(gradients)), gradients, strict=True)
        ]
        for group, members in self._members():
            lr = float(group["lr"])
            for t in members:
                moment_step_(
                    t,
                    self.state[t.parameter],
                    draws,
                    self.config,
                    lr=lr,
                    decay=decay_of(lr, group["weight_decay"]),
                    updates=self.updates - self.skipped + 1,
                )

    def _step_reference(self, gradients: Sequence[float]) -> None:
        """Update as MeZO's authors do, by directions of torch's generator."""
        rates = {
            id(t.parameter): (float(group["lr"]) / len(gradients), float(group["weight_decay"]))
            for group, members in self._members()
            for t in members
        }
        for key, g in zip(self.keys(len(gradients)), gradients, strict=True):
            self.reference.update(key, g, [rates[id(t.parameter)] for t in self.trained])

    def _members(self) -> list[tuple[dict[str, Any], list[Trained]]]:
        known = {id(t.parameter): t for t in self.trained}
        return [(group, [known[id(p)] for p in group["params"]]) for group in self.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, while the optimizer is made.

        Raises:
            ValueError: an option is out of range, or the optimizer stands.
        """
        if hasattr(self, "log"):
            raise ValueError(
                "param_groups: got one more; name all groups when making the optimizer"
            )
        if "lr" not in param_group:
            raise ValueError("lr: a parameter group has none; use for example 1e-6")
        super().add_param_group({**param_group, "lr": float(param_group["lr"])})
        self.param_groups[-1]["lr"] = param_group["lr"]  # a tensor stays one

    def _check_fit(self) -> None:
        grouped = {id(p) for group in self.param_groups for p in group["params"]}
        if grouped != {id(t.parameter) for t in self.trained}:
            raise ValueError(
                f"groups: hold {len(grouped)} parameters, other ones than the {len(self.trained)} "
                "of the trained set; build them from the trained set"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return options, state, log and masks, of types that `weights_only` loading takes."""
        found = super().state_dict()
        own = {"header": self.log.header, "skipped": self.skipped, "log": self.log.tensors()}
        return {**found, ENTRY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run: its updates, log, state, and the thresholds of its masks.

        Thresholds are fixed where a run starts, so a new optimizer takes those of the saved run;
        build what else uses masks, such as a mode, from `trained` afterwards.

        Raises:
            ValueError: the saved run is another one; the message names the first difference.
        """
        saved = state_dict.get(ENTRY)
        if saved is None:
            raise ValueError("optimizer: the saved state is of no zeroth-order run; start anew")
        check_header(saved["header"])
        header = self.log.header
        other = difference(saved["header"], header)
        if other is None and self.updates > 0:
            other = other_threshold(saved["header"], header)
        if other is not None:
            raise ValueError(f"{other}; resume with the settings that the run was started with")
        log = ZerothOrderLog.from_tensors(dict(saved["header"]), saved["log"])
        super().load_state_dict(state_dict)
        masks = {row[0]: mask_of(row) for row in log.header["trained"]}
        self.trained[:] = [replace(t, mask=masks[t.name]) for t in self.trained]
        self.log, self.skipped = log, int(saved["skipped"])
        self._pending, self._proposed, self.moved = None, False, ()


def _check_rule(config: ZerothOrderConfig, groups: Sequence[Mapping[str, Any]]) -> None:
    decay = max(float(group["weight_decay"]) for group in groups)
    if config.update == "conservative" and decay:
        raise ValueError(
            f"weight_decay: got {decay:g} with update='conservative', which would move away from "
            "the point that was compared; set weight_decay=0"
        )


def _check_size(
    config: ZerothOrderConfig, trained: Sequence[Trained], model_size: int | None
) -> None:
    if config.update not in STATEFUL or config.dense_state or model_size is None:
        return
    size = sum(t.parameter.numel() for t in trained)
    if size > SHARE * model_size:
        state = 4 * size * len(STATEFUL[config.update])
        raise ValueError(
            f"update: got {config.update!r}, whose state of {size:,} trained weights would take "
            f"{state / 2**20:,.0f} MiB, allowed is it for up to {SHARE:.0%} of the model; use "
            "update='sgd', train an adapter, or set dense_state=True"
        )
