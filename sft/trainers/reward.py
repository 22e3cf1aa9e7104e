"""TRL's reward modelling with our training."""

from __future__ import annotations

from trl import RewardTrainer

from sft.trainer import SparseTrainingMixin


class SparseRewardTrainer(SparseTrainingMixin, RewardTrainer):  # type: ignore[misc]
    """`trl.RewardTrainer` for models with a sparse adapter; takes the same arguments."""
