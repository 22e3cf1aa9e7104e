"""A linear layer that is nothing but a low-rank product plus a sparse matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from sft.adapters.low_rank_sparse.layer import SLTrainLinear
from sft.adapters.residency import Residence


class SLTrainWholeLinear(SLTrainLinear):
    """W = c B A + S in place of a dense weight: SLTrain as it pre-trains.

    It keeps nothing of the weight it is put around, and so cannot wrap a pre-trained layer: the
    base's parameter is replaced by one of no entries, until merging composes the dense weight. The
    bias stays, and is trained.

    Args:
        base_layer: nn.Linear or Conv1D; its weight may be on the meta device.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        weight = self._stored_weight()
        # a weight that never was lands on the device of the surrounding torch.device
        device = None if weight.is_meta else weight.device
        self._gone = torch.empty(0, dtype=weight.dtype, device=device)
        self._set_weight(self._gone)

    def _set_weight(self, weight: Tensor) -> None:
        # past the setter: under low_cpu_mem_usage that of PEFT's leaves shapes alone
        self.get_base_layer()._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def residence(self, name: str) -> Residence | None:
        """Return None: there is no weight to write to."""
        return None

    def beside(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Apply c B A + S and the bias, or the dense weight if it was merged."""
        if self.merged:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        if len(names) != 1:
            raise ValueError(
                f"form: 'pretrain' has no base beneath its one adapter, {len(names)} are active; "
                "leave it enabled"
            )
        return self.multiply(x, names[0], self.get_base_layer().bias)

    def _mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError("adapter_names: form='pretrain' has one adapter; leave them out")

    def pretrained_weight(self) -> Tensor:
        """Refuse: there is none."""
        raise ValueError("selection: form='pretrain' has no weights to read; choose 'random'")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compose the dense weight, in float32 or wider, and round it once to the base's dtype."""
        names = check_adapters_to_merge(self, adapter_names)
        for name in [name for name in names if name in self.trained_values]:
            weight = self.get_delta_weight(name)
            if safe_merge and not bool(torch.isfinite(weight).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            self._set_weight(weight.to(self._stored_weight().dtype))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Drop the dense weight again."""
        weight = self._stored_weight()
        self._set_weight(self._gone.to(dtype=weight.dtype, device=weight.device))
        self.merged_adapters.clear()
