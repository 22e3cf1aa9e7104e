"""The trained model in one process, from what an engine left in shards."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.export.reloaded import reload


def is_sharding(trainer: Any) -> bool:
    """Tell whether a Trainer's engine may hold the model in shards, or fp32 copies apart."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def put_together(trainer: Any, base: Callable[[], Any] | None, *, first: bool) -> Any:
    """Save what was trained, all processes together, and load it in the first one.

    Args:
        trainer: has trained.
        base: loads the model under the adapter that was trained, or None: its own weights were.
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
        model = reload(folder) if base is None else _loaded(folder, base())
    return model.to(trainer.args.device).eval()


def _load_whole() -> None:
    """Let transformers no longer partition what it loads, as it does while ZeRO-3 is configured."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _loaded(folder: Path, base: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)
