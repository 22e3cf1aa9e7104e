"""Replay of a zeroth-order run: base and log give its weights again, without a forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft.errors import UserError
from sft.optim.zeroth_order.header import config_of, mask_of
from sft.optim.zeroth_order.keys import parameter_ids
from sft.optim.zeroth_order.log import ZerothOrderLog
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.trained import Trained
from sft.run.folder import ZEROTH_ORDER
from sft.zeroth_order.log import LOG, frozen_sha, weights_sha


@torch.no_grad()
def replay_onto(model: nn.Module, log: ZerothOrderLog, count: int | None = None) -> None:
    """Apply the updates of a log to a model that is as it was before the first of them.

    Args:
        model: plain or adapted, on any device.
        log: of a run in mode "exact".
        count: how many updates; default: all.

    Raises:
        UserError: the model is not what the run started from, or its mode cannot be replayed.
    """
    _check_mode(log)
    optimizer = _optimizer(model, log)
    for number, row in enumerate(log.rows):
        if number == count:
            break
        for group, rate in zip(optimizer.param_groups, row.rates, strict=True):
            group["lr"] = rate
        optimizer.propose(row.gradients)
        optimizer.step()


def find_log(source: Path) -> Path:
    """Return the log in a run's folder, in its zeroth_order folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    for path in (source, source / LOG, source / ZEROTH_ORDER / LOG):
        if path.is_file():
            return path
    raise UserError(f"{source}: no {LOG} there; give the folder of a run with a zeroth_order one")


def load_log(path: Path) -> ZerothOrderLog:
    """Read a log.

    Raises:
        UserError: it is damaged, or of a mode that cannot be replayed.
    """
    try:
        log = ZerothOrderLog.load(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_mode(log)
    return log


def trained_tensors(model: nn.Module, log: ZerothOrderLog) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, in the order of the log.

    Raises:
        UserError: the model lacks one, or has it in another shape or type.
    """
    own = dict(model.named_parameters())
    found = {}
    for name, shape, dtype, *_ in log.header["trained"]:
        parameter = own.get(name)
        if parameter is None:
            raise UserError(f"base: has no parameter {name!r}, which the run trained")
        if list(parameter.shape) != list(shape):
            raise UserError(f"base: {name} has shape {list(parameter.shape)}, the run's {shape}")
        if str(parameter.dtype) != f"torch.{dtype}":
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"base: {name} is {kind}, the run's {dtype}")
        found[name] = parameter
    return found


def _check_mode(log: ZerothOrderLog) -> None:
    mode = log.header["mode"]
    if mode != "exact":
        raise UserError(
            f"log: was written with mode={mode!r}, whose rounding drift is in no log; take the "
            "run's checkpoints or its merged folder, or train with mode='exact'"
        )


def _optimizer(model: nn.Module, log: ZerothOrderLog) -> ZerothOrderOptimizer:
    """Return a new optimizer of the log's trained set."""
    header = log.header
    tensors = trained_tensors(model, log)
    found = {"start_sha": weights_sha(tensors.items()), "frozen_sha": frozen_sha(model, tensors)}
    if any(header.get(key) not in (None, sha) for key, sha in found.items()):
        raise UserError(
            "base: its weights are others than those the run started from; give the very model, "
            "or its revision, that the run was given"
        )
    ids = parameter_ids(row[0] for row in header["trained"])
    trained = []
    groups: list[dict[str, Any]] = [{"params": [], "lr": 0.0} | g for g in header["groups"]]
    for row in header["trained"]:
        name, _, _, group, _ = row
        trained.append(Trained(name, tensors[name], ids[name], mask_of(row)))
        groups[group]["params"].append(tensors[name])
    config = config_of(header)
    return ZerothOrderOptimizer(groups, trained, config, header["seed"], queries=header["queries"])
