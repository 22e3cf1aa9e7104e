"""Trained models that are in files already: written whole, or as a patch of their base."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sft.errors import UserError
from sft.export.checkpoint import Checkpoint, Slot
from sft.export.patch import check_fits, open_patches, patched_base, write_one
from sft.models import load_config
from sft.recipe.schema import ModelSpec


class FolderWeights:
    """A trained model that was written whole.

    Args:
        folder: of the model.
        base: what it was trained from, for who asks for differences.
    """

    def __init__(self, folder: Path, base: str | None = None) -> None:
        from transformers import AutoConfig

        self.config = AutoConfig.from_pretrained(folder)
        self._files = Checkpoint(str(folder.absolute()), key=str(folder))
        self._base = None if base is None else Checkpoint(base)
        self._known = set() if self._base is None else set(self._base.names())

    def names(self) -> list[str]:
        """Return the names of the tensors in its files."""
        return self._files.names()

    def changed(self) -> list[str]:
        """Return all names: which of them moved is seen by reading."""
        return self.names()

    def slot(self, name: str) -> Slot:
        """Return the type and shape of a tensor."""
        return _known(self._files, name)

    def before(self, name: str) -> Tensor | None:
        """Return a tensor of the base."""
        return self._base.read(name) if self._base is not None and name in self._known else None

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._files.read(name)


class PatchedWeights:
    """A base with a patch.

    Args:
        folder: of the patch.
        base: hub id, folder or embedded name; default: as the patch says.
    """

    def __init__(self, folder: Path, base: str | None = None) -> None:
        name = base or patched_base(folder)
        self.base: tuple[str, str | None] = (name, None)
        self.config = load_config(ModelSpec(name=name), "--base")
        self._files, self._folder = Checkpoint(name), folder
        self._patched = open_patches(folder)

    def names(self) -> list[str]:
        """Return the names of the tensors of the base."""
        return self._files.names()

    def changed(self) -> list[str]:
        """Return the names of those that are patched."""
        return [name for name in self.names() if name in self._patched]

    def slot(self, name: str) -> Slot:
        """Return the type and shape of a tensor."""
        return _known(self._files, name)

    def before(self, name: str) -> Tensor:
        """Return a tensor of the base."""
        return self._files.read(name)

    def read(self, name: str) -> Tensor:
        """Return a tensor, patched."""
        found = self._files.read(name)
        if name in self._patched:
            patch, before = self._patched[name]
            check_fits(found, patch, before, self._folder)
            write_one(found, patch)
        return found


def _known(files: Checkpoint, name: str) -> Slot:
    found = files.slot(name)
    if found is None:
        raise UserError(f"{files.folder}: {name} has a type that is not known here")
    return found
