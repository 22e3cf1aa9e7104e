"""`sft verify`: is an adapter whole, does it fit its base, is it what was trained?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft.adapters.layer import SparseLayer
from sft.adapters.support import fingerprint
from sft.environment import versions
from sft.errors import UserError, one_line
from sft.run.folder import RECORD
from sft.tools.describe import describe_changes
from sft.tools.found import AdapterChanges
from sft.tools.opened import TENSORS, find_adapter, open_adapter, read_settings
from sft.tools.weights import Weights

OK, FAILED, NOTE = "ok", "FAILED", "note"


@dataclass(frozen=True)
class Check:
    """What was looked at.

    Args:
        name: of what.
        verdict: ok, FAILED, or a note: nothing is known to be wrong.
        text: one line.
    """

    name: str
    verdict: str
    text: str


def verify_adapter(
    folder: Path, base: str | None = None, support: str | None = None
) -> list[Check]:
    """Check a saved adapter; a check that fails ends those that build on it.

    Args:
        folder: of the adapter, or of a run.
        base: what it belongs on; default: as it says.
        support: the start of the hash that its support must have; default: that of run.json.
    """
    return list(_checks(folder, base, support))


def _checks(folder: Path, base: str | None, support: str | None) -> Iterator[Check]:
    done = Attempt()
    yield done("files", lambda: _files(folder))
    if done.failed:
        return
    place = find_adapter(folder)
    yield done("settings", lambda: _settings(place))
    yield done("values", lambda: _values(place))
    found: list[AdapterChanges] = []
    yield done("fit", lambda: _fit(place, base, found))
    if found:
        yield done("base", lambda: _base(found[0], base))
        yield done("support", lambda: _support(found[0], place, support))
    yield done("versions", lambda: _versions(place))


class Attempt:
    """Turns what a check returns or raises into its verdict; tells whether any failed."""

    failed = False

    def __call__(self, name: str, look: Callable[[], str | Check]) -> Check:
        """Look, and return the verdict."""
        try:
            found = look()
        except UserError as error:
            self.failed = True
            return Check(name, FAILED, one_line(error))
        return found if isinstance(found, Check) else Check(name, OK, found)


def _files(folder: Path) -> str:
    from safetensors import SafetensorError, safe_open

    place = find_adapter(folder)
    try:
        with safe_open(place / TENSORS, "pt") as file:
            count = len(file.keys())
    except (OSError, SafetensorError) as error:
        text = f"{place / TENSORS}: does not read ({one_line(error)[:200]}); copy it anew"
        raise UserError(text) from error
    size = (place / TENSORS).stat().st_size
    return f"{count} tensors, {size:,} bytes"


def _settings(place: Path) -> str:
    from peft import PeftConfig

    from sft.adapters import registry

    registry.register_all()
    settings = read_settings(place)
    try:
        config = PeftConfig.from_pretrained(str(place))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"adapter_config.json: {one_line(error)[:300]}") from error
    base = settings.get("base_model_name_or_path") or "no base that it names"
    return f"{config.peft_type.value.lower()}, trained on {base}"


def _values(place: Path) -> str:
    """Read each tensor of the file; NaN and infinity are refused."""
    from safetensors import safe_open

    count = 0
    with safe_open(place / TENSORS, "pt") as file:
        for name in file.keys():  # noqa: SIM118, this is no dictionary
            tensor = file.get_tensor(name)
            if not tensor.is_floating_point():
                continue
            wrong = int((~torch.isfinite(tensor)).sum())
            if wrong:
                raise UserError(
                    f"{name} holds {wrong} values that are not finite; the training diverged, take "
                    "an earlier checkpoint"
                )
            count += tensor.numel()
    return f"all {count:,} finite"


def _fit(place: Path, base: str | None, found: list[AdapterChanges]) -> str:
    """Open the adapter over the shapes of its base: names, sizes, order and range of positions."""
    changes = AdapterChanges(open_adapter(place, base))
    found.append(changes)
    text = f"{len(changes.names())} modules have their place and shape"
    positions = sum(
        layer.support(changes.opened.adapter).numel()
        for layer in changes.opened.layers().values()
        if isinstance(layer, SparseLayer)
    )
    return f"{text}; {positions:,} positions ascend and lie inside" if positions else text


def _base(changes: AdapterChanges, base: str | None) -> str | Check:
    """Compare fingerprints with the weights on disk, one at a time."""
    weights = Weights(changes.base, None if base else changes.opened.config.revision)
    same, unknown, others = 0, 0, []
    for name, layer in changes.opened.layers().items():
        wanted = changes.fingerprint(name)
        parameter = _stored_name(name, layer) if wanted else None
        found = None if parameter is None else weights.parameter(parameter)
        has = 0 if found is None else fingerprint(found)
        if not wanted or not has:
            unknown += 1
        elif wanted == has:
            same += 1
        else:
            others.append(name)
    if others:
        raise UserError(
            f"{len(others)} of {len(changes.names())} modules were trained on other weights than "
            f"those of {changes.base}, first {others[0]}; give the base that it was trained on"
        )
    if not same:
        text = "no fingerprints to compare: the adapter or the base has none"
        return Check("base", NOTE, text)
    left = f"; {unknown} have none" if unknown else ""
    return f"{same} fingerprints are those of {changes.base}{left}"


def _stored_name(name: str, layer: Any) -> str | None:
    """Return the name of the parameter under a layer."""
    from sft.adapters.geometry import stored_weight

    base = layer.get_base_layer()
    wanted = stored_weight(base)
    for key, parameter in base.named_parameters(recurse=False):
        if parameter is wanted:
            return f"{name}.{key}"
    return None


def _support(changes: AdapterChanges, place: Path, wanted: str | None) -> str:
    """Hash the support, and compare it with the one asked for or noted by the run."""
    found = describe_changes(changes)["support_hash"]
    source = "the one asked for"
    if wanted is None:
        wanted, source = _noted(place), f"that of {RECORD}"
    if wanted is None:
        return f"sha256 {found}"
    if not found.startswith(wanted.lower()):
        raise UserError(f"sha256 {found} is not {source}, {wanted}; other weights were trained")
    return f"sha256 {found}, {source}"


def _noted(place: Path) -> str | None:
    """Return the hash that the run wrote down."""
    try:
        record = json.loads((place.parent / RECORD).read_text(encoding="utf-8"))
        noted = record["support"]["support_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(noted)


def _versions(place: Path) -> str | Check:
    """Compare the versions it was made with to those here."""
    made: dict[str, Any] = {"peft": read_settings(place).get("peft_version")}
    try:
        record = json.loads((place.parent / RECORD).read_text(encoding="utf-8"))
        made |= dict(record.get("versions", {}))
    except (OSError, ValueError, AttributeError, TypeError):
        pass  # an adapter that is no run's
    here = versions()
    others = [
        f"{name} {made[name]} (here {here[name]})"
        for name in ("sparse-sft", "peft", "transformers", "torch")
        if made.get(name) and here.get(name) and made[name] != here[name]
    ]
    if others:
        return Check("versions", NOTE, f"made with {', '.join(others)}")
    return "those it was made with"
