"""The weights of a checkpoint on disk, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from sft.errors import UserError, one_line
from sft.models import load_model, locate
from sft.recipe.schema import ModelSpec

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Weights:
    """The tensors of a saved model, by name.

    Args:
        name: hub id (as far as it is cached or can be fetched), folder or embedded name.
        revision: of a hub id.
        key: what an error calls the name: where the user gave it.

    Raises:
        UserError: it holds no safetensors.
    """

    def __init__(self, name: str, revision: str | None = None, key: str = "--base") -> None:
        self.name = name
        self._spec = ModelSpec(name=name, revision=revision)
        self.folder = _folder(self._spec, key)
        self._files = _files(self.folder, name, key)
        self._loaded: dict[str, Tensor] | None = None

    def names(self) -> list[str]:
        """Return the names of the tensors in the files."""
        return sorted(self._files)

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in the files, in the dtype that it is saved in."""
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def parameter(self, name: str) -> Tensor | None:
        """Return a parameter by its name in the model, or None: there is none.

        Files may leave out what is tied, lack the prefix of the body, or lay weights out otherwise
        than the model in memory, which is loaded then.
        """
        if name in self._files:
            return self.read(name)
        ends = [k for k in self._files if k.endswith(f".{name}") or name.endswith(f".{k}")]
        if len(ends) == 1:
            return self.read(ends[0])
        if self._loaded is None:
            model = load_model(self._spec, "--base")
            self._loaded = dict(model.named_parameters(remove_duplicate=False))
        found = self._loaded.get(name)
        return None if found is None else found.detach()


def is_model(folder: Path) -> bool:
    """Tell whether a folder holds a saved model."""
    weights = (folder / INDEX).is_file() or (folder / SINGLE).is_file()
    return weights and (folder / "config.json").is_file()


def _folder(spec: ModelSpec, key: str) -> Path:
    place = locate(spec, key)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json"]
        return Path(snapshot_download(place, revision=spec.revision, allow_patterns=wanted))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(f"{key}: {spec.name}: cannot be had ({one_line(error)[:200]})") from error


def _files(folder: Path, name: str, key: str) -> dict[str, Path]:
    """Return the file of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / INDEX).is_file():
            content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            return {tensor: folder / file for tensor, file in content["weight_map"].items()}
        with safe_open(folder / SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    except FileNotFoundError as error:
        raise UserError(
            f"{key}: {name}: no {SINGLE} in it; save the model as safetensors first"
        ) from error
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{key}: {name}: is damaged ({one_line(error)[:200]})") from error
