"""TRL's supervised fine-tuning with our training: it tokenises, masks and collates, we train."""

from __future__ import annotations

from trl import SFTTrainer

from sft.trainer import SparseTrainingMixin


class SparseSFTTrainer(SparseTrainingMixin, SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` for models with a sparse adapter; takes the same arguments."""
