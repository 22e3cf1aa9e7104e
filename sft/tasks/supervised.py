"""`task: sft`: a language model learns to write completions, replies, or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sft.data.encode import Encoded, encode
from sft.evaluation import language
from sft.evaluation.batches import held_out_batches
from sft.evaluation.spec import EvaluationSpec
from sft.tasks.base import PROBED, TaskBase


class Supervised(TaskBase):
    """Supervised fine-tuning by TRL's SFTTrainer."""

    name: ClassVar[str] = "sft"
    summary: ClassVar[str] = "a language model learns completions, replies, or text"
    arguments: ClassVar[str] = "trl:SFTConfig"
    trainer: ClassVar[str] = "sft.trainers.supervised:SparseSFTTrainer"
    formats: ClassVar[tuple[str, ...]] = ("prompt_completion", "messages", "text", "tokenised")
    metrics: ClassVar[tuple[str, ...]] = language.NAMES
    measured: ClassVar[tuple[str, ...]] = ("nll",)

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Measure completions: likelihood of the right ones, error rates of the greedy ones."""
        return language.measure(model, processor, rows, format, spec, longest)

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return prompts with their completions."""
        encoded = _encoded(rows, format, processor, longest)
        return held_out_batches(encoded, size, processor.pad_token_id, model.device, PROBED)


def _encoded(rows: Any, format: str, tokenizer: Any, longest: int) -> list[Encoded]:
    return [encode(row, format, tokenizer, longest) for row in rows]
