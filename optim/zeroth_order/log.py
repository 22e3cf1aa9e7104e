"""The log of a zeroth-order run: a few bytes an update, from which the run can be repeated."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sft.optim.zeroth_order.header import FORMAT, check_header

KEY = "sft_zeroth_order"  # of the header in the file's metadata
TENSORS = ("gradients", "rates", "lengths", "columns")


class Row(NamedTuple):
    """One update."""

    gradients: tuple[float, ...] | None  # projected gradient of each direction; None: skipped
    rates: tuple[float, ...]  # learning rate of each parameter group


class ZerothOrderLog:
    """Projected gradients and learning rates of every update, and what they apply to.

    Keys of the noise are not kept: they follow from seed, number of the update and direction. Equal
    rates in a row are kept once, so a constant schedule costs nothing.

    Args:
        header: what `sft.optim.zeroth_order.header.describe` returns; entries may be added.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header
        self._gradients = array("f")
        self._rates = array("d")
        self._lengths = array("i")

    def __len__(self) -> int:
        return len(self._gradients) // self._queries

    @property
    def rows(self) -> Iterator[Row]:
        """All updates, from the first."""
        n, start = self._queries, 0
        for run, length in enumerate(self._lengths):
            rates = tuple(self._rates[run * self._groups : (run + 1) * self._groups])
            for at in range(start, start + length):
                found = tuple(self._gradients[at * n : (at + 1) * n])
                yield Row(None if math.isnan(found[0]) else found, rates)
            start += length

    def append(self, gradients: Sequence[float] | None, rates: Sequence[float]) -> None:
        """Add an update.

        Args:
            gradients: projected gradient of each direction, as applied; None for a skipped update.
            rates: learning rate of each parameter group.
        """
        kept = [math.nan] * self._queries if gradients is None else list(gradients)
        assert len(kept) == self._queries and len(rates) == self._groups
        self._gradients.extend(kept)
        new = array("d", rates)
        if self._lengths and self._rates[-self._groups :] == new:
            self._lengths[-1] += 1
        else:
            self._rates.extend(new)
            self._lengths.append(1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the rows as tensors.

        Returns:
            gradients: (updates, queries), float32 or float16; NaN where an update was skipped.
            rates: (runs, columns), float64; lengths: (runs,), int32: how many updates each holds.
            columns: (groups,), int32: the column of each group; groups with equal rates share one.
        """
        dtype = getattr(torch, self.header["log_dtype"])
        distinct, columns = _distinct(_tensor(self._rates).view(-1, self._groups))
        return {
            "gradients": _tensor(self._gradients).to(dtype).view(-1, self._queries),
            "rates": distinct,
            "lengths": _tensor(self._lengths),
            "columns": columns,
        }

    @classmethod
    def from_tensors(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> ZerothOrderLog:
        """Return the log that `header` and `tensors` describe.

        Raises:
            ValueError: they are not those of a log, or do not fit each other.
        """
        check_header(header)
        found = cls(header)
        _check_tensors(header, tensors)
        held = {name: tensors[name].cpu() for name in TENSORS}
        found._gradients = _array("f", held["gradients"].float())
        found._rates = _array("d", held["rates"][:, held["columns"].long()])
        found._lengths = _array("i", held["lengths"])
        return found

    def save(self, path: str | Path) -> None:
        """Write the log to a safetensors file, which appears whole or not at all."""
        path = Path(path)
        text = json.dumps(self.header, separators=(",", ":"), allow_nan=False)
        content = save(self.tensors(), metadata={KEY: text})
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> ZerothOrderLog:
        """Read a log.

        Raises:
            ValueError: the file is damaged, or is not a log of this format.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get(KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if text is None:
                raise ValueError(f"it holds no {KEY} entry")
            return cls.from_tensors(json.loads(text), tensors)
        except (SafetensorError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"log: {path} is damaged or not a zeroth-order log of format {FORMAT} ({reason}); "
                "name the file that the run wrote"
            ) from error

    @property
    def _queries(self) -> int:
        return int(self.header["queries"])

    @property
    def _groups(self) -> int:
        return len(self.header["groups"])


def _tensor(values: array[Any]) -> Tensor:
    """Copy numbers by their bytes: a long log is written often."""
    return torch.from_numpy(np.array(values))


def _array(code: str, values: Tensor) -> array[Any]:
    return array(code, values.contiguous().numpy().tobytes())


def _distinct(rates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns that differ, and for each column which of them it is."""
    kept: list[Tensor] = []
    places = []
    for column in rates.unbind(1):
        place = next((i for i, other in enumerate(kept) if torch.equal(other, column)), None)
        if place is None:
            place = len(kept)
            kept.append(column)
        places.append(place)
    return torch.stack(kept, 1), torch.tensor(places, dtype=torch.int32)


def _check_tensors(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors are what `ZerothOrderLog.tensors` can return."""
    _require(set(tensors) == set(TENSORS), f"it holds the tensors {', '.join(sorted(tensors))}")
    gradients, rates, lengths, columns = (tensors[name] for name in TENSORS)
    dtypes = (getattr(torch, header["log_dtype"]), torch.float64, torch.int32, torch.int32)
    for name, dtype in zip(TENSORS, dtypes, strict=True):
        _require(tensors[name].dtype == dtype, f"{name} are {tensors[name].dtype}")
    shaped = gradients.ndim == 2 and gradients.shape[1] == header["queries"]
    _require(shaped, f"gradients have shape {tuple(gradients.shape)}")
    _require(rates.ndim == 2 and lengths.shape == rates.shape[:1], "rates and lengths differ")
    _require(bool((lengths > 0).all()), "a length is not positive")
    _require(int(lengths.sum()) == len(gradients), "lengths do not sum to the number of updates")
    fits = columns.shape == (len(header["groups"]),) and rates.shape[1] > 0
    _require(fits, f"columns have shape {tuple(columns.shape)}")
    inside = (columns >= 0) & (columns < rates.shape[1])
    _require(bool(inside.all()), "columns are out of range")
    _require(bool((rates.isfinite() & (rates >= 0)).all()), "a learning rate is not finite or < 0")
    skipped = gradients.isnan().all(1, keepdim=True)
    _require(bool((skipped | gradients.isfinite()).all()), "a projected gradient is not finite")


def _require(fits: bool, otherwise: str) -> None:
    if not fits:
        raise ValueError(otherwise)
