"""`sft replay`: rebuild a zeroth-order run's weights from its base and its log, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft.errors import UserError, one_line
from sft.export import export_checked
from sft.export_adapter import DTYPES
from sft.export_delta import save_delta
from sft.folder import ZEROTH_ORDER
from sft.models import load_model, load_tokenizer
from sft.optim.zeroth_order.header import config_of, mask_of
from sft.optim.zeroth_order.keys import parameter_ids
from sft.optim.zeroth_order.log import ZerothOrderLog
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.trained import Trained
from sft.schema import ModelSpec
from sft.whole import refuse_filled, written_whole
from sft.zeroth_order_log import LOG, START, weights_sha

FORMATS = ("merged", "adapter", "delta")


@dataclass(frozen=True)
class Replayed:
    """What a replay did.

    Args:
        updates: that were applied, with those that the run skipped.
        proven: the weights have the hash that the run noted at its end; None where it noted none,
            or where not all of the log was replayed.
        detail: of what was written.
    """

    updates: int
    proven: bool | None
    detail: str


def replay(
    source: Path,
    *,
    to: Path,
    base: str | None = None,
    until: int | None = None,
    form: str = "merged",
    dtype: str = "auto",
    device: str = "cpu",
    overwrite: bool = False,
) -> Replayed:
    """Rebuild the weights of a run, without a forward pass, and write them.

    Args:
        source: the log, the folder it lies in, or the folder of the run.
        to: folder to write.
        base: what the run started from: hub id, folder or embedded name; default: as logged.
        until: number of updates to apply; default: all of them.
        form: "merged", a stock model; "adapter", of a run that trained one; "delta", the changed
            weights alone, of a run that trained the model itself.
        dtype: cast of the merged weights; "auto" keeps those of the run.
        device: where to compute; with noise="gaussian" one of the run's kind.
        overwrite: replace `to` when it is filled.

    Raises:
        UserError: log, base and request do not fit together, or the weights are not the run's.
    """
    path = find_log(source)
    log = load_log(path)
    _check_request(log, path, form=form, dtype=dtype, device=device)
    count = len(log) if until is None else until
    if not 0 <= count <= len(log):
        raise UserError(f"--until: got {until}, allowed is 0 to {len(log)}, the updates of {path}")
    if not overwrite:
        refuse_filled(to, "--to", "pass --overwrite to replace it")
    spec = ModelSpec(name=base or log.header.get("model") or _no_base(path), dtype=_dtype(log))
    model = _opened(log, path, spec).to(device)
    before = _copies(model, log) if form == "delta" else {}
    replay_onto(model, log, count)
    proven = _proof(model, log, count)
    writers: dict[str, Callable[[], str]] = {
        "merged": lambda: _write_merged(model, _tokenizer(path, spec), to, dtype),
        "adapter": lambda: _write_adapter(model, _tokenizer(path, spec), to),
        "delta": lambda: save_delta(to, before, _tensors(model, log), log.header),
    }
    return Replayed(count, proven, writers[form]())


@torch.no_grad()
def replay_onto(model: nn.Module, log: ZerothOrderLog, count: int | None = None) -> None:
    """Apply the updates of a log to a model that is as it was before the first of them.

    Args:
        model: plain or adapted, on any device.
        log: of a run in mode "exact".
        count: how many updates; default: all.

    Raises:
        UserError: the model is not what the run started from; one line says in what.
    """
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
    mode = log.header["mode"]
    if mode != "exact":
        raise UserError(
            f"{path}: was written with mode={mode!r}, whose rounding drift is in no log; take the "
            "run's checkpoints or its merged folder, or train with mode='exact'"
        )
    return log


def _check_request(log: ZerothOrderLog, path: Path, *, form: str, dtype: str, device: str) -> None:
    if form not in FORMATS:
        raise UserError(f"--format: got {form!r}; expected one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype: got {dtype!r}; expected one of {', '.join(DTYPES)}")
    if dtype != "auto" and form != "merged":
        raise UserError(f"--dtype: is of merged weights; leave it out with --format {form}")
    adapted = bool(log.header.get("adapter"))
    if form == "adapter" and not adapted:
        raise UserError("--format: got adapter; the run trained the model itself, take merged")
    if form == "delta" and adapted:
        raise UserError("--format: got delta; the run trained an adapter, take adapter or merged")
    logged = log.header.get("device", device)
    if log.header["noise"] == "gaussian" and torch.device(device).type != logged:
        raise UserError(
            f"{path}: noise='gaussian' gives other bits on {device} than on {logged}; pass "
            f"--device {logged}"
        )


def _optimizer(model: nn.Module, log: ZerothOrderLog) -> ZerothOrderOptimizer:
    """Return a new optimizer of the log's trained set."""
    header = log.header
    tensors = _tensors(model, log)
    found = weights_sha(tensors.items())
    if header["start_sha"] not in (None, found):
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


def _tensors(model: nn.Module, log: ZerothOrderLog) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, in the order of the log."""
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


def _copies(model: nn.Module, log: ZerothOrderLog) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in _tensors(model, log).items()}


def _opened(log: ZerothOrderLog, path: Path, spec: ModelSpec) -> Any:
    """Load the base, and the adapter that the run started from."""
    from peft import PeftModel

    from sft.adapters import registry

    registry.register_all()
    model = load_model(spec)
    if not log.header.get("adapter"):
        return model
    start = path.parent / START
    if not start.is_dir():
        raise UserError(f"{start}: not there; a run that trained an adapter starts from it")
    folders = [(f.parent.name, f.parent) for f in sorted(start.glob("*/adapter_config.json"))]
    if (start / "adapter_config.json").is_file():
        folders.insert(0, ("default", start))
    try:
        (name, folder), *more = folders
        model = PeftModel.from_pretrained(model, str(folder), name, is_trainable=True)
        for name, folder in more:
            model.load_adapter(str(folder), name, is_trainable=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{start}: does not fit {spec.name}: {one_line(error)[:300]}") from error
    return model


def _proof(model: nn.Module, log: ZerothOrderLog, count: int) -> bool | None:
    """Compare with the hash that the run noted at its end.

    Raises:
        UserError: they differ.
    """
    wanted = log.header["end_sha"]
    if wanted is None or count < len(log):
        return None
    if weights_sha(_tensors(model, log).items()) != wanted:
        raise UserError(
            "log: leads to other weights than the run ended with; something else moved them (a "
            "callback, a proximal step), so take the run's own adapter or merged folder"
        )
    return True


def _write_merged(model: Any, tokenizer: Any, to: Path, dtype: str) -> str:
    cast = None if dtype == "auto" else getattr(torch, dtype)
    difference = export_checked(model.to("cpu"), tokenizer, to, cast)
    return f"reloaded, max |logit difference| {difference:g}"


def _write_adapter(model: Any, tokenizer: Any, to: Path) -> str:
    with written_whole(to) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return "an adapter"


def _tokenizer(path: Path, spec: ModelSpec) -> Any:
    """Prefer the tokenizer that the run saved beside its adapter."""
    saved = path.parent.parent / "adapter"
    trained_with = (saved / "tokenizer_config.json").is_file()
    return load_tokenizer(ModelSpec(name=str(saved.absolute())) if trained_with else spec)


def _dtype(log: ZerothOrderLog) -> Any:
    return log.header.get("model_dtype", "auto")


def _no_base(path: Path) -> str:
    raise UserError(f"{path}: does not name the model it started from; pass --base")
