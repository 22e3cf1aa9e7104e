"""The weights of a base with an adapter, merged from their files one at a time.

No model is built: an adapter's layers stand around parameters of no memory; when a weight is asked
for, it is read, the layer merges into it as it does in memory, and gives it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.errors import UserError, one_line
from sft.export.checkpoint import Checkpoint, Slot
from sft.export.loaded import shapes_of


class WholeModelNeededError(Exception):
    """Why the weights cannot be made one at a time; the message completes "because ..."."""


class AdapterWeights:
    """A base with a saved adapter.

    Args:
        folder: of the adapter.
        base: hub id, folder or embedded name; default: as the adapter says.

    Raises:
        WholeModelNeededError: files and model are laid out differently, or the method does not
            merge weight by weight.
        UserError: base and adapter do not fit together.
    """

    def __init__(self, folder: Path, base: str | None = None) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._opened = shapes_of(folder, base)
        self._model = self._opened.model.get_base_model()
        self.config = _config(self._model, type(self._model).__name__)
        found = self._opened.layers().items()
        self._layers = {n: x for n, x in found if isinstance(x, BaseTunerLayer)}
        self._whole = self._opened.whole()
        self._check_method()
        revision = None if base else getattr(self._opened.config, "revision", None)
        self.base: tuple[str, str | None] = (self._opened.base, revision)
        self._files = _files(*self.base)
        self._untie()
        self._check_files()

    def names(self) -> list[str]:
        """Return the names of the model's tensors; of those that are tied, one."""
        return list(self._slots)

    def changed(self) -> list[str]:
        """Return the weights under adapters, heads, and what is no longer tied."""
        return [n for n in self._slots if n in self._whole or n in self._untied or self._owner(n)]

    def slot(self, name: str) -> Slot:
        """Return the type and shape of a tensor."""
        return self._slots[name]

    def before(self, name: str) -> Tensor | None:
        """Return a tensor of the base; there is none for a head that is no longer tied."""
        return self._files.read(name) if name in self._known else None

    def read(self, name: str) -> Tensor:
        """Return a tensor, merged where the adapter lies over it.

        Raises:
            UserError: it is of another base than the adapter was trained on.
        """
        if name in self._whole:
            dense: Tensor = self._whole[name].detach().to(self._slots[name].dtype)
            return dense
        owner = self._owner(name)
        if owner is None:
            return self._files.read(self._untied.get(name, name))
        return self._merged(owner, name)

    def _merged(self, owner: str, name: str) -> Tensor:
        from sft.adapters.layer import SparseLayer

        layer, part = self._layers[owner], name.rpartition(".")[2]
        base, adapter = layer.get_base_layer(), self._opened.adapter
        own = {key: f"{owner}.{key}" for key, _ in base.named_parameters(recurse=False)}
        with _holding(base, {key: self._files.read(full) for key, full in own.items()}):
            self._check_base(owner, layer)
            layer.merge(adapter_names=[adapter])
            found: Tensor = getattr(base, part).detach().clone()
            if isinstance(layer, SparseLayer):
                layer.unmerge()
            else:  # what stock methods subtract again is thrown away here
                layer.merged_adapters.clear()
        return found

    def _check_base(self, owner: str, layer: Any) -> None:
        from sft.adapters.geometry import stored_weight
        from sft.adapters.layer import SparseLayer
        from sft.adapters.support import check_base

        if isinstance(layer, SparseLayer):
            made_for = torch.tensor([layer.made_for(self._opened.adapter)])
            try:
                check_base(made_for, stored_weight(layer.get_base_layer()), owner, "base")
            except ValueError as error:
                raise UserError(
                    f"{self._opened.folder}: does not fit the base {self._opened.base}: "
                    f"{one_line(error)[:300]}"
                ) from error

    def _owner(self, name: str) -> str | None:
        """Return the adapted module that a tensor is a direct parameter of."""
        owner = name.rpartition(".")[0]
        return owner if owner in self._layers else None

    def _check_method(self) -> None:
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        if getattr(self._opened.config, "from_scratch", False):
            raise WholeModelNeededError("the adapter has no base weights")
        for name, module in self._model.named_modules():
            odd = isinstance(module, AuxiliaryTrainingWrapper)
            if odd and not isinstance(module, ModulesToSaveWrapper):
                raise WholeModelNeededError(f"{name} trains single tokens")
        for name, layer in self._layers.items():
            if not hasattr(layer, "merge") or layer.base_layer is not layer.get_base_layer():
                raise WholeModelNeededError(f"{name} does not merge by itself")
        if not self._layers and not self._whole:
            raise WholeModelNeededError("the method adds nothing to single weights")

    def _untie(self) -> None:
        """Note which tied tensors are none any more: one of them was trained."""
        tied = getattr(self._model, "all_tied_weights_keys", {})
        changed = {n for pair in tied.items() for n in pair if n in self._whole or self._owner(n)}
        self._tied = {} if changed else dict(tied)
        self._untied = dict(tied) if changed else {}
        if changed:
            self.config.tie_word_embeddings = False

    def _check_files(self) -> None:
        """Find all tensors of the model in the files, as the model holds them."""
        self._known, self._slots = set(self._files.names()), {}
        packed = getattr(self.config, "quantization_config", None)
        if packed:
            raise WholeModelNeededError("the base is stored quantised")
        for name, shape in _plain_tensors(self._model, self._layers):
            held = self._untied.get(name, name)
            if name in self._tied and name not in self._known:
                continue
            if held not in self._known and name not in self._whole:
                raise WholeModelNeededError(f"the files of the base have no {held}")
            found = self._files.slot(held) if held in self._known else None
            dtype = self.config.dtype or torch.float32
            slot = found or Slot(dtype, shape)
            alike = not slot.dtype.is_floating_point or slot.dtype == dtype
            if (slot.shape != shape and name not in self._whole) or not alike:
                raise WholeModelNeededError(f"the files of the base hold {held} as another tensor")
            self._slots[name] = Slot(slot.dtype, shape)


def _files(base: str, revision: str | None) -> Checkpoint:
    try:
        return Checkpoint(base, revision)
    except UserError as error:
        raise WholeModelNeededError(f"the base has no safetensors ({error})") from error


def _plain_tensors(model: Any, layers: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of a model's tensors as it would save them without adapters."""
    own = tuple(
        f"{name}.{part}."
        for name, layer in layers.items()
        for part in (*layer.adapter_layer_names, *layer.other_param_names)
    )
    for name, tensor in model.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if name.startswith(own) or ".original_module." in name:
            continue
        if ".modules_to_save." in plain:
            head, _, rest = plain.partition(".modules_to_save.")
            plain = f"{head}.{rest.partition('.')[2]}"
        yield plain, tuple(tensor.shape)


def _config(model: Any, architecture: str) -> Any:
    """Return a model's configuration as it is saved with its weights."""
    import copy

    config = copy.deepcopy(model.config)
    config.architectures = [architecture]
    return config


@contextmanager
def _holding(base: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Give a module real weights for a while."""
    placeholders = dict(base._parameters)
    try:
        for key, tensor in tensors.items():
            base._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        with torch.no_grad():
            yield
    finally:
        base._parameters.update(placeholders)
