"""axolotl's trainers with our training; imported where axolotl is."""

from __future__ import annotations

from axolotl.core.trainers import AxolotlDPOTrainer, AxolotlTrainer

from sft.trainer import SparseTrainingMixin


class SparseAxolotlTrainer(SparseTrainingMixin, AxolotlTrainer):  # type: ignore[misc]
    """axolotl's trainer of language models, for models with a sparse adapter."""


class SparseAxolotlDPOTrainer(SparseTrainingMixin, AxolotlDPOTrainer):  # type: ignore[misc]
    """axolotl's trainer of preferences; the reference is the model with the adapter off."""
