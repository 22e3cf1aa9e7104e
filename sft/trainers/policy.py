"""TRL's group relative policy optimisation with our training."""

from __future__ import annotations

from trl import GRPOTrainer

from sft.trainer import SparseTrainingMixin


class SparseGRPOTrainer(SparseTrainingMixin, GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` for models with a sparse adapter; takes the same arguments.

    With `beta` above 0 the reference is the same model with the adapter off.
    """
