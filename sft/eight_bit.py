"""`optim_args: min_8bit_size=N`: from which size on bitsandbytes keeps state in 8 bits."""

from __future__ import annotations

from typing import Any

KEY = "min_8bit_size"


def set_min_8bit_size(optimizer: Any, optim_args: str | None) -> None:
    """Hand an 8-bit optimizer the bound that transformers leaves at 4096 entries.

    The trained values of one layer are often fewer, and would keep their state in 32 bits.

    Args:
        optimizer: of bitsandbytes, if the bound is given.
        optim_args: `TrainingArguments.optim_args`, "key=value" by commas.

    Raises:
        ValueError: the bound is no number, or the optimizer takes none.
    """
    pairs = (pair.partition("=") for pair in (optim_args or "").replace(" ", "").split(","))
    given = {key: value for key, _, value in pairs}
    if KEY not in given:
        return
    if not given[KEY].isdigit():
        raise ValueError(f"optim_args: got {KEY}={given[KEY]}, allowed is a number of entries")
    settings = getattr(optimizer, "args", None)
    if not hasattr(settings, KEY):
        raise ValueError(
            f"optim_args: got {KEY}, which {type(optimizer).__name__} does not take; set optim to "
            "an 8-bit optimizer such as adamw_bnb_8bit"
        )
    setattr(settings, KEY, int(given[KEY]))
