"""What a layer does before its tensors are read or replaced, and after."""

from __future__ import annotations

from typing import Any

from torch import nn


def watch_state(layer: nn.Module) -> None:
    """Let whatever reads or replaces the base meet the pre-trained weight."""
    layer.register_load_state_dict_pre_hook(_restore)  # type: ignore[no-untyped-call]
    layer.register_state_dict_pre_hook(_restore)  # type: ignore[no-untyped-call]
    layer.register_load_state_dict_post_hook(look_again)  # type: ignore[no-untyped-call]


def look_again(layer: Any, *_: Any) -> None:
    """Find anew where a layer's adapters lie: indices are data, which a compiled graph can't read.

    To be called wherever they were made, replaced or loaded.
    """
    for name in layer.trained_values:
        layer.residence(name)


def _restore(layer: Any, *_: Any) -> None:
    layer._residency.restore()
