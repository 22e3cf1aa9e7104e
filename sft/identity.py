"""What identifies a sparse run: its method's settings, its supports, its base."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from sft.adapters.base import SparseTuner
from sft.adapters.layer import sparse_layers
from sft.adapters.support import support_hash

Settings = dict[str, dict[str, Any]]

logger = logging.getLogger(__name__)

# bookkeeping of PEFT that says nothing of the method
_NOT_SETTINGS = {"inference_mode", "peft_version", "auto_mapping", "base_model_name_or_path"}


def sparse_tuner(model: nn.Module) -> SparseTuner | None:
    """Return the tuner of a PeftModel with a sparse adapter, else None."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, SparseTuner) else None


def model_support_hash(model: nn.Module) -> str:
    """Return the SHA-256 over all supports of the model."""
    return support_hash(
        (f"{name}.{adapter}", layer.support(adapter))
        for name, layer in sparse_layers(model).items()
        for adapter in layer.trained_values
    )


def support_checksum(model: nn.Module) -> int:
    """Return 60 bits of the hash of all supports, for ranks to compare."""
    return int(model_support_hash(model)[:15], 16)


def base_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the fingerprints of the adapted base weights."""
    return support_hash(
        (f"{name}.{adapter}", torch.tensor([layer.made_for(adapter)]))
        for name, layer in sparse_layers(model).items()
        for adapter in layer.trained_values
    )


def method_settings(tuner: SparseTuner) -> Settings:
    """Return the settings of the active adapters as plain values."""
    return {
        adapter: {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in tuner.peft_config[adapter].to_dict().items()
            if key not in _NOT_SETTINGS
        }
        for adapter in tuner.active_adapters
    }


def warn_of_changes(before: Settings, now: Settings) -> None:
    """Name every setting in which a resumed run differs from the one that was interrupted."""
    for owner, settings in now.items():
        for key, value in settings.items():
            old = before.get(owner, {}).get(key)
            if old != value:
                logger.warning(
                    "resume: %s.%s was %r and is now %r; the run will not end as the interrupted "
                    "one would have",
                    owner, key, old, value,
                )  # fmt: skip
