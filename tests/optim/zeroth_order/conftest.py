"""Tensors, optimizers and updates that tests of zeroth order share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from sft.optim.zeroth_order.trained import Trained, trained_set

SEED = 5


class Lab:
    """Every call with the same arguments gives the same bits."""

    @staticmethod
    def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=generator).mul_(0.02).to(dtype) for shape in shapes]
        return [nn.Parameter(tensor, requires_grad=False) for tensor in made]

    @staticmethod
    def build(
        parameters: Sequence[nn.Parameter],
        *,
        lr: Any = 1e-3,
        decays: Sequence[float] = (),
        mask: Any = None,
        **changes: Any,
    ) -> ZerothOrderOptimizer:
        """One group, or one for each of `decays`, of a parameter each."""
        trained = [Trained(f"w{i}", p, 100 + i, mask) for i, p in enumerate(parameters)]
        groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": lr, "weight_decay": 0.0}]
        if decays:
            groups = [
                {"params": [p], "lr": lr, "weight_decay": decay}
                for p, decay in zip(parameters, decays, strict=True)
            ]
        return ZerothOrderOptimizer(groups, trained, ZerothOrderConfig(**changes), SEED)

    @staticmethod
    def masked(dtype: torch.dtype, sparsity: float, **changes: Any) -> ZerothOrderOptimizer:
        parameters = Lab.weights((64, 80), (3, 5, 7), dtype=dtype)
        config = ZerothOrderConfig(sparsity=sparsity, **changes)
        trained = trained_set([("a", parameters[0]), ("b", parameters[1])], config, SEED)
        group = {"params": parameters, "lr": 0.01, "weight_decay": 0.0}
        return ZerothOrderOptimizer([group], trained, config, SEED)

    @staticmethod
    def run(optimizer: Any, updates: Sequence[Sequence[float] | None]) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        for gradients in updates:
            inner.propose(gradients)
            optimizer.step()

    @staticmethod
    def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(Lab.bits(a), Lab.bits(b), strict=True))

    @staticmethod
    def bits(tensors: Sequence[Tensor]) -> list[Tensor]:
        sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        return [t.detach().clone().view(sizes[t.element_size()]) for t in tensors]


@pytest.fixture
def zo() -> type[Lab]:
    return Lab
