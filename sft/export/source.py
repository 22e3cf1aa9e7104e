"""What `sft export` is given: an adapter, a run, a delta, a patch, or a trained model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.export.adapter import Say, export_adapter
from sft.export.adapter_weights import AdapterWeights, WholeModelNeededError
from sft.export.delta import delta_base, export_delta, is_delta
from sft.export.loaded import SETTINGS, load_processor, load_trained, spec_of
from sft.export.merged import merge
from sft.export.patch import apply_patches, is_patch, patched_base
from sft.export.reloaded import reload
from sft.export.stored import FolderWeights, PatchedWeights
from sft.export.trained import TrainedWeights
from sft.models import locate
from sft.recipe.schema import ModelSpec
from sft.run.folder import ADAPTER, MERGED, RECIPE
from sft.tools.weights import is_model


@dataclass(frozen=True)
class Source:
    """A trained model in one of the forms that a run or an export leaves.

    Args:
        kind: "adapter", "delta", "patch" or "model".
        folder: where it lies.
        base: what it was trained from, as the user or the run names it; None: the folder may know.
        run: folder of the run that left it, if any.
    """

    kind: str
    folder: Path
    base: str | None = None
    run: Path | None = None

    @property
    def base_known(self) -> bool:
        """Whether there is a base: a whole model may have none."""
        return self.kind != "model" or bool(self.base)

    def base_spec(self) -> ModelSpec:
        """Return the base, packed as it was in training.

        Raises:
            UserError: neither the user nor the folder names it.
        """
        if self.kind == "adapter":
            return spec_of(self.folder, self.base)
        known = {"delta": delta_base, "patch": patched_base}.get(self.kind)
        name = self.base or (known(self.folder) if known else None)
        if not name:
            raise UserError(f"{self.folder}: does not name its base model; pass --base")
        return ModelSpec(name=name)

    def processor(self) -> Any:
        """Return tokenizer or image processor, or None."""
        own = ModelSpec(name=str(self.folder.absolute()))
        return load_processor(self.folder, own if self.kind == "model" else self.base_spec())

    @contextmanager
    def opened(
        self, *, quantized: str | None = None, say: Say = print
    ) -> Iterator[tuple[TrainedWeights, Callable[[], Any]]]:
        """Give the trained weights one at a time, and how to load the trained model whole.

        What cannot be had weight by weight is merged into a temporary folder first.

        Args:
            quantized: over a packed base, what to merge into.
            say: takes what happens on the way.
        """
        if self.kind == "model":
            yield FolderWeights(self.folder, self.base), lambda: reload(self.folder)
        elif self.kind == "patch":
            yield PatchedWeights(self.folder, self.base), self._patched
        elif (found := self._by_weight(quantized, say)) is not None:
            yield found, lambda: merge(load_trained(self.folder, self.base, packed=False))
        else:
            with tempfile.TemporaryDirectory() as work:
                merged = Path(work) / MERGED
                self._merge(merged, quantized, say)
                yield FolderWeights(merged, self.base_spec().name), lambda: reload(merged)

    def _by_weight(self, quantized: str | None, say: Say) -> AdapterWeights | None:
        if self.kind != "adapter":
            return None
        if self.base_spec().quantization is not None and quantized != "reference":
            return None
        try:
            return AdapterWeights(self.folder, self.base)
        except WholeModelNeededError as reason:
            say(f"merged as a whole in memory, because {reason}")
            return None

    def _merge(self, to: Path, quantized: str | None, say: Say) -> None:
        if self.kind == "delta":
            export_delta(self.folder, base=self.base, to=to)
        else:
            export_adapter(self.folder, base=self.base, to=to, quantized=quantized, say=say)

    def _patched(self) -> Any:
        model = reload(locate(self.base_spec(), "--base"))
        apply_patches(dict(model.named_parameters()), self.folder)
        return model


def find_source(folder: Path, base: str | None = None) -> Source:
    """Tell what a folder holds.

    Args:
        folder: of an adapter, a run, a delta, a patch or a model.
        base: what it was trained from, if the user says so.

    Raises:
        UserError: it holds none of these.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give that of an adapter or of a run")
    run = next((place for place in (folder, folder.parent) if (place / RECIPE).is_file()), None)
    for place in (folder, folder / ADAPTER, folder / MERGED):
        kind = _kind(place)
        if kind is not None:
            given = base
            if kind == "model" and run is not None and base is None:
                given = _model_name(run / RECIPE)
            return Source(kind, place, given, run)
    raise UserError(
        f"{folder}: holds no adapter ({SETTINGS}), delta, patch or model, and no run with one; "
        "give the folder that it lies in"
    )


def _model_name(recipe: Path) -> str | None:
    """Return the model that a run's recipe names."""
    import yaml

    try:
        name = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["name"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return str(name)


def _kind(folder: Path) -> str | None:
    if (folder / SETTINGS).is_file():
        return "adapter"
    if is_delta(folder):
        return "delta"
    if is_patch(folder):
        return "patch"
    return "model" if is_model(folder) else None
