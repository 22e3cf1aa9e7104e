"""`sft replay`: rebuild a zeroth-order run from base and log, and write it in a stock format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft.errors import UserError, one_line
from sft.export.delta import save_delta
from sft.export.loaded import DTYPES, cast_of
from sft.export.merged import export_checked
from sft.models import load_model, load_tokenizer
from sft.optim.zeroth_order.log import ZerothOrderLog
from sft.optim.zeroth_order.rules import STATEFUL
from sft.quantization import as_trained, is_quantized, write_record
from sft.recipe.schema import ModelSpec
from sft.whole import refuse_target, written_whole
from sft.zeroth_order.log import START, weights_sha
from sft.zeroth_order.replay import find_log, load_log, replay_onto, trained_tensors

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
        device: where to compute; of the run's kind with noise="gaussian", momentum or Adam.
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
    spec = as_trained(path.parent, _base(log, path, base))
    _check_packed(spec, form)
    refuse_target(to, overwrite=overwrite, sources=[path, spec.name])
    model = _opened(log, path, spec, device)
    before = _copies(model, log) if form == "delta" else {}
    replay_onto(model, log, count)
    proven = _proof(model, log, count)
    writers: dict[str, Callable[[], str]] = {
        "merged": lambda: _write_merged(model, _tokenizer(path, spec), to, dtype),
        "adapter": lambda: _write_adapter(model, _tokenizer(path, spec), spec, to),
        "delta": lambda: save_delta(to, before, trained_tensors(model, log), log.header),
    }
    return Replayed(count, proven, writers[form]())


def _check_request(log: ZerothOrderLog, path: Path, *, form: str, dtype: str, device: str) -> None:
    if form not in FORMATS:
        raise UserError(f"--format: got {form!r}; expected one of {', '.join(FORMATS)}")
    cast_of(dtype)
    if dtype != "auto" and form != "merged":
        raise UserError(f"--dtype: is of merged weights; leave it out with --format {form}")
    try:
        torch.zeros(1, device=device).item()  # of "meta" there are no values
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: got {device!r}: {one_line(error)[:200]}") from error
    adapted = bool(log.header.get("adapter"))
    if form == "adapter" and not adapted:
        raise UserError("--format: got adapter; the run trained the model itself, take merged")
    if form == "delta" and adapted:
        raise UserError("--format: got delta; the run trained an adapter, take adapter or merged")
    header = log.header
    logged = header.get("device", device)
    bound = {"noise": ("gaussian",), "update": tuple(STATEFUL)}
    for key, values in bound.items():
        if header[key] in values and torch.device(device).type != logged:
            raise UserError(
                f"{path}: {key}={header[key]!r} gives other bits on {device} than on {logged}; "
                f"pass --device {logged}"
            )


def _check_packed(spec: ModelSpec, form: str) -> None:
    """Raise UserError where there are several ways to merge, and none was asked for."""
    if spec.quantization is not None and form == "merged":
        raise UserError(
            f"--format: got merged, but the base is packed ({spec.quantization.bits}); take "
            "--format adapter, then sft export it --to merged"
        )


def _copies(model: nn.Module, log: ZerothOrderLog) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained_tensors(model, log).items()}


def _opened(log: ZerothOrderLog, path: Path, spec: ModelSpec, device: str) -> Any:
    """Load the base, and the adapter that the run started from; packed weights do not move."""
    from peft import PeftModel

    from sft.adapters import registry

    registry.register_all()
    model = load_model(spec, "--base", device=device)
    model = model if is_quantized(model) else model.to(device)
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
        model = PeftModel.from_pretrained(model, str(folder), name)
        for name, folder in more:
            model.load_adapter(str(folder), name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{start}: does not fit {spec.name}: {one_line(error)[:300]}") from error
    if spec.quantization is not None:
        _cast_as_logged(model, log)
    return model


def _cast_as_logged(model: nn.Module, log: ZerothOrderLog) -> None:
    """Give the adapter the type that it was trained in: TRL casts one over a packed base."""
    own = dict(model.named_parameters())
    for name, _, dtype, *_ in log.header["trained"]:
        if name in own:
            own[name].data = own[name].data.to(getattr(torch, dtype))


def _proof(model: nn.Module, log: ZerothOrderLog, count: int) -> bool | None:
    """Compare with the hash that the run noted at its end.

    Raises:
        UserError: they differ.
    """
    wanted = log.header["end_sha"]
    if wanted is None or count < len(log):
        return None
    if weights_sha(trained_tensors(model, log).items()) != wanted:
        raise UserError(
            "log: leads to other weights than the run ended with; something else moved them (a "
            "callback, a proximal step), so take the run's own adapter or merged folder"
        )
    return True


def _write_merged(model: Any, tokenizer: Any, to: Path, dtype: str) -> str:
    difference = export_checked(model.to("cpu"), tokenizer, to, cast_of(dtype))
    return f"reloaded, max |logit difference| {difference:g}"


def _write_adapter(model: Any, tokenizer: Any, spec: ModelSpec, to: Path) -> str:
    with written_whole(to) as temporary:
        model.save_pretrained(temporary)
        write_record(temporary, spec)
        tokenizer.save_pretrained(temporary)
    return "an adapter"


def _tokenizer(path: Path, spec: ModelSpec) -> Any:
    """Prefer the tokenizer that the run saved beside its adapter."""
    saved = path.parent.parent / "adapter"
    trained_with = (saved / "tokenizer_config.json").is_file()
    return load_tokenizer(ModelSpec(name=str(saved.absolute())) if trained_with else spec, "--base")


def _base(log: ZerothOrderLog, path: Path, given: str | None) -> ModelSpec:
    """Return what the run started from, unless another name of it is given."""
    header = log.header
    name = given or header.get("model")
    if not name:
        raise UserError(f"{path}: does not name the model it started from; pass --base")
    revision = None if given else header.get("revision")
    dtype = header.get("model_dtype")
    return ModelSpec(name=name, revision=revision, dtype=dtype if dtype in DTYPES else "auto")
