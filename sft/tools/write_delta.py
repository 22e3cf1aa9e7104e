"""Write changes as the adapter of a static SpIEL delta, in the form that PEFT loads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.adapters.packing import pack
from sft.errors import UserError
from sft.tools.change import Change
from sft.tools.found import AdapterChanges
from sft.tools.opened import TENSORS

PREFIX = "base_model.model."


def write_delta(
    folder: Path,
    changes: Mapping[str, Change],
    fingerprints: Mapping[str, int],
    adapters: Sequence[AdapterChanges],
) -> None:
    """Write an adapter.

    Args:
        folder: exists.
        changes: by module; each reaches something.
        fingerprints: of the base weights.
        adapters: what they were made of: the first one's tokenizer and task come along.

    Raises:
        UserError: a weight is no matrix, or modules were trained whole in several adapters.
    """
    from safetensors.torch import save_file

    dense = _dense(adapters)
    state = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in dense.items()}
    for name, change in changes.items():
        if len(change.shape) != 2:
            raise UserError(
                f"compose: {name} is {change.shape}, and a delta is written for matrices; leave "
                "adapters of such modules out"
            )
        state |= _entries(f"{PREFIX}{name}", change, fingerprints.get(name, 0))
    _config(changes, adapters).save_pretrained(str(folder))
    save_file(state, folder / TENSORS, metadata={"format": "pt"})
    _copy_tokenizer(adapters, folder)


def _entries(start: str, change: Change, made_for: int) -> dict[str, Tensor]:
    return {
        f"{start}.delta_values": change.values.contiguous(),
        f"{start}.delta_indices": pack(change.support, change.numel).unsqueeze(0),
        f"{start}.delta_base": torch.tensor([made_for]),
    }


def _config(changes: Mapping[str, Change], adapters: Sequence[AdapterChanges]) -> Any:
    from sft.adapters.methods.spiel import SpielConfig

    first = adapters[0].opened.config
    saved = {name for adapter in adapters for name in adapter.opened.config.modules_to_save or ()}
    return SpielConfig(
        num_weights_by_module={name: len(change.values) for name, change in changes.items()},
        growth="none",
        target_modules=_targets(adapters[0].opened.model, list(changes)),
        modules_to_save=sorted(saved) or None,
        task_type=first.task_type,
        auto_mapping=first.auto_mapping,
        base_model_name_or_path=first.base_model_name_or_path or adapters[0].base,
        revision=first.revision,
        inference_mode=True,
    )


def _targets(model: Any, names: list[str]) -> list[str] | str:
    """Return modules by full name; as one expression where a name is another one's end."""
    wanted, ends = set(names), tuple(f".{name}" for name in names)
    known = (name for name, _ in model.get_base_model().named_modules())
    if not any(name.endswith(ends) and name not in wanted for name in known):
        return sorted(names)
    return "|".join(re.escape(name) for name in sorted(names))


def _dense(adapters: Sequence[AdapterChanges]) -> dict[str, Tensor]:
    """Return what the adapters trained whole, where they agree on it.

    Raises:
        UserError: they do not: what is no difference from the base cannot be combined.
    """
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, parameter in adapter.opened.whole().items():
            own = parameter.detach()
            if name in found and not torch.equal(found[name], own):
                raise UserError(
                    f"compose: {name} was trained whole in several adapters, and is no difference "
                    "from a base; compose adapters without modules_to_save, or one of them"
                )
            found[name] = own
    return found


def _copy_tokenizer(adapters: Sequence[AdapterChanges], folder: Path) -> None:
    """Save the first tokenizer that lies beside an adapter, with its chat template."""
    from transformers import AutoTokenizer

    for adapter in adapters:
        place = adapter.opened.folder
        if place is not None and (place / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(place).save_pretrained(folder)
            return
