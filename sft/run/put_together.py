"""The trained model in one process, from what an engine left in shards."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sft.models import load_model
from sft.recipe.schema import ModelSpec


def is_sharding(trainer: Any) -> bool:
    """Tell whether a Trainer's engine may hold the model in shards, or fp32 copies apart."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def put_together(trainer: Any, spec: ModelSpec, *, adapter: bool, first: bool) -> Any:
    """Save what was trained, all processes together, and load it in the first one.

    Args:
        trainer: has trained.
        spec: of the base model.
        adapter: an adapter was trained, not the model's own weights.
        first: whether this process is the one that loads.

    Returns:
        the model, on the trainer's device, or None in the other processes.
    """
    with tempfile.TemporaryDirectory(prefix="sft-") as name:
        folder = Path(name)
        trainer.save_model(str(folder))  # every process lends its shards, the first one writes
        if not first:
            return None
        _load_whole()
        model = _loaded(folder, spec) if adapter else load_model(_at(spec, folder))
    return model.to(trainer.args.device).eval()


def _load_whole() -> None:
    """Let transformers no longer partition what it loads, as it does while ZeRO-3 is configured."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _loaded(folder: Path, spec: ModelSpec) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(spec), folder)


def _at(spec: ModelSpec, folder: Path) -> ModelSpec:
    return spec.model_copy(update={"name": str(folder), "revision": None})
