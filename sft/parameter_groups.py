"""Give some parameters an optimizer group of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


def split_groups(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Move parameters out of the groups they are in, into new ones with other settings.

    Args:
        optimizer: has made no step yet.
        groups: torch parameter groups; what they leave out is as in the optimizer's defaults.
    """
    moved = {id(parameter) for group in groups for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    for group in groups:
        trained = [p for p in group["params"] if p.requires_grad]
        optimizer.add_param_group({**group, "params": trained})
