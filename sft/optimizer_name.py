"""Which optimizer a method's configuration comes to."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments


def optimizer_name(config: Any, args: TrainingArguments) -> str:
    """Return "trainer", "adamw" or "sm3".

    Args:
        config: of the method.
        args: an `optim` other than the default wins over "auto".
    """
    name: str = config.optimizer
    if name != "auto":
        return name
    named = args.optim != TrainingArguments.__dataclass_fields__["optim"].default
    return "trainer" if named else config.suited_optimizer
