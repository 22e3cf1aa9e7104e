"""What exports read a trained model by: tensors by a stock checkpoint's names, one at a time."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from sft.export.checkpoint import Slot


class TrainedWeights(Protocol):
    """A trained model, read one tensor at a time."""

    config: Any  # of the stock model, as it is saved

    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the model."""

    def changed(self) -> list[str]:
        """Return the names of those that training may have changed."""

    def slot(self, name: str) -> Slot:
        """Return the type and shape of a tensor."""

    def before(self, name: str) -> Tensor | None:
        """Return a tensor of the base, or None: the base has none of this name."""

    def read(self, name: str) -> Tensor:
        """Return a trained tensor."""
