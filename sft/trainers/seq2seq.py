"""transformers' Seq2SeqTrainer with our training."""

from __future__ import annotations

from transformers import Seq2SeqTrainer

from sft.trainer import SparseTrainingMixin


class SparseSeq2SeqTrainer(SparseTrainingMixin, Seq2SeqTrainer):  # type: ignore[misc]
    """`transformers.Seq2SeqTrainer` for models with a sparse adapter; takes the same arguments."""
