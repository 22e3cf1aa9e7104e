"""Embedding look-ups that see displaced rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sft.kernels.displace_rows import displace_rows
from sft.optim.zeroth_order.modes import Draws
from sft.optim.zeroth_order.reads import LOOK_UPS
from sft.optim.zeroth_order.trained import Trained


class DisplacedRows(TorchFunctionMode):
    """While entered, a look-up in one table returns rows of w - sum_q c_q z_q.

    Only the rows that are asked for are made, however large the table is.
    """

    def __init__(self, table: Trained, draws: Draws, kind: str) -> None:
        super().__init__()
        self._table, self._draws, self._kind = table, draws, kind

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in LOOK_UPS:
            weight, ids = _operands(func, args, kwargs or {})
            if weight is self._table.parameter:
                return self._rows(weight, ids)
        return func(*args, **(kwargs or {}))

    def _rows(self, weight: Tensor, ids: Tensor) -> Tensor:
        rows, places = torch.unique(ids, return_inverse=True)
        table = self._table
        found = displace_rows(
            weight.detach(), rows, table.id, self._draws, kind=self._kind, mask=table.mask
        )
        return found[places]


def _operands(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return (table, ids); the two functions take them in opposite orders."""
    names = ("input", "weight") if func is LOOK_UPS[0] else ("weight", "indices")
    first, second = (args[i] if i < len(args) else kwargs[names[i]] for i in (0, 1))
    return (second, first) if func is LOOK_UPS[0] else (first, second)
