"""What a folder changes of a base, weight by weight: an adapter, a delta, or a whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sft.adapters.layer import SparseLayer
from sft.errors import UserError, one_line
from sft.export.delta import CONTENT, is_delta
from sft.export.delta import TENSORS as DELTA_TENSORS
from sft.run.folder import MERGED, RECORD
from sft.tools.change import Change, change_of, wide
from sft.tools.opened import Opened, find_adapter, is_adapter, open_adapter
from sft.tools.weights import Weights, is_model


class Changes(Protocol):
    """Differences from a base. They are read one at a time, whatever the model's size."""

    @property
    def method(self) -> str:
        """What made them: a method's name, "delta" or "model"."""

    @property
    def base(self) -> str:
        """What they are differences from."""

    def names(self) -> list[str]:
        """Return the names of the changed weights' modules, in the order of the model."""

    def read(self, name: str) -> Change:
        """Return the difference of one of them."""


@dataclass
class AdapterChanges:
    """Those of an adapter.

    Args:
        opened: the adapter.
    """

    opened: Opened
    _layers: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._layers = self.opened.layers()
        if not self._layers:
            raise UserError(
                f"{self.opened.folder or 'adapter'}: {self.method} trains no weight of the base; "
                "tools read methods that change weights"
            )

    @property
    def method(self) -> str:
        """The adapter's method."""
        return self.opened.method

    @property
    def base(self) -> str:
        """What it was trained on."""
        return self.opened.base

    def names(self) -> list[str]:
        """Return the adapted modules."""
        return list(self._layers)

    def read(self, name: str) -> Change:
        """Return what the adapter adds to a module's weight."""
        return change_of(self._layers[name], self.opened.adapter)

    def fingerprint(self, name: str) -> int:
        """Return the fingerprint of the base weight that it was made for; 0 if it has none."""
        layer = self._layers[name]
        return layer.made_for(self.opened.adapter) if isinstance(layer, SparseLayer) else 0


@dataclass
class DeltaChanges:
    """Those of a delta of the model itself, as zeroth-order runs leave it.

    Args:
        folder: with delta.safetensors.
        given: what it is a delta of; default: as it says.
    """

    folder: Path
    given: str | None = None
    method: str = "delta"

    def __post_init__(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            content = json.loads((self.folder / CONTENT).read_text(encoding="utf-8"))
            with safe_open(self.folder / DELTA_TENSORS, "pt") as file:
                keys = set(file.keys())
            self._shapes: Mapping[str, list[int]] = dict(content["shapes"])
            self.base = str(self.given or content["model"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            text = f"{self.folder}: is no whole delta ({one_line(error)[:200]}); write it again"
            raise UserError(text) from error
        self._names = [name for name in self._shapes if f"{name}.indices" in keys]
        self._weights = Weights(self.base, None if self.given else content.get("revision"))

    def names(self) -> list[str]:
        """Return the modules whose weight has changed."""
        return [name.removesuffix(".weight") for name in self._names]

    def read(self, name: str) -> Change:
        """Return new minus old where they differ.

        Raises:
            UserError: the base has no such weight of this shape.
        """
        from safetensors import safe_open

        key = name if name in self._shapes else f"{name}.weight"
        with safe_open(self.folder / DELTA_TENSORS, "pt") as file:
            indices = file.get_tensor(f"{key}.indices").long()
            values = file.get_tensor(f"{key}.values")
        old, shape = self._weights.parameter(key), tuple(self._shapes[key])
        if old is None or tuple(old.shape) != shape:
            raise UserError(f"{self.folder}: does not fit {self.base}: it has no such {key}")
        before = wide(old).flatten()[indices]
        return Change(shape, wide(values) - before, indices, len(indices))


@dataclass
class ModelChanges:
    """Those of a whole model from another one of the same layout.

    Args:
        model: hub id, folder or embedded name.
        base: the other one.
        keys: what errors call both: where the user gave them.
    """

    model: str
    base: str
    method: str = "model"
    keys: tuple[str, str] = ("model", "--base")

    def __post_init__(self) -> None:
        self._new = Weights(self.model, key=self.keys[0])
        self._old = Weights(self.base, key=self.keys[1])
        self._keys = [key for key in self._new.names() if self._is_weight(key)]

    def names(self) -> list[str]:
        """Return the modules of which a bit has changed; reads all weights once."""
        changed = (key for key in self._keys if not torch.equal(*self._pair(key)))
        return [key.removesuffix(".weight") for key in changed]

    def read(self, name: str) -> Change:
        """Return new minus old where they differ."""
        key = name if name in self._keys else f"{name}.weight"
        new, old = self._pair(key)
        indices = (new != old).flatten().nonzero().flatten()
        values = (new - old).flatten()[indices]
        return Change(tuple(new.shape), values, indices, len(indices))

    def _is_weight(self, key: str) -> bool:
        return self._old.parameter(key) is not None

    def _pair(self, key: str) -> tuple[Tensor, Tensor]:
        new, old = self._new.read(key), self._old.parameter(key)
        assert old is not None
        if new.shape != old.shape:
            raise UserError(
                f"{self.model}: its {key} is {tuple(new.shape)}, that of {self.base} is "
                f"{tuple(old.shape)}; give the base that it was trained on"
            )
        return wide(new), wide(old)


def find_changes(target: str, base: str | None = None) -> Changes:
    """Return what a target changes.

    Args:
        target: folder of an adapter, a run, a delta, or a model (any name of one, with a base).
        base: what it is compared with; default: as the adapter, delta or run says.

    Raises:
        UserError: it is none of these.
    """
    folder = Path(target).expanduser()
    if is_delta(folder):
        return DeltaChanges(folder, base)
    if is_model(folder) or (base is not None and not folder.is_dir()):
        if base is None:
            raise UserError(f"{target}: is a whole model; pass --base to see what it changes")
        return ModelChanges(target, base)
    if is_model(folder / MERGED) and not is_adapter(folder):
        return ModelChanges(str(folder / MERGED), base or _trained_by(folder))
    return AdapterChanges(open_adapter(find_adapter(folder), base))


def _trained_by(run: Path) -> str:
    """Return the model that a run trained as a whole."""
    try:
        model = json.loads((run / RECORD).read_text(encoding="utf-8"))["recipe"]["model"]
        name, started_at_random = str(model["name"]), model.get("config") is not None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run}: does not say what it trained; pass --base") from error
    if started_at_random:
        raise UserError(f"{run}: trained random weights; there is no base to compare with")
    return name


def pairs(first: Changes, second: Changes) -> Iterator[tuple[str, Change | None, Change | None]]:
    """Walk over the modules of two, side by side."""
    left, right = dict.fromkeys(first.names()), dict.fromkeys(second.names())
    for name in left | right:
        one = first.read(name) if name in left else None
        yield name, one, second.read(name) if name in right else None
