"""`task: reward`: a model learns to score replies as people compared them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sft.data.load import Examples
from sft.evaluation.batches import held_out_batches
from sft.evaluation.preference import NAMES, encode_reply, measure_rewards
from sft.evaluation.spec import EvaluationSpec
from sft.models import load_model
from sft.recipe.schema import ModelSpec
from sft.tasks.base import PROBED, HeadTask
from sft.tasks.labels import with_labels


class Reward(HeadTask):
    """Reward modelling by TRL's RewardTrainer: a new head of one output on the model."""

    name: ClassVar[str] = "reward"
    summary: ClassVar[str] = "a model learns to score replies as people compared them"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    arguments: ClassVar[str] = "trl:RewardConfig"
    trainer: ClassVar[str] = "sft.trainers.reward:SparseRewardTrainer"
    sequences: ClassVar[int] = 2  # the chosen reply and the rejected one
    peft_type: ClassVar[str | None] = "SEQ_CLS"
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    metrics: ClassVar[tuple[str, ...]] = NAMES
    measured: ClassVar[tuple[str, ...]] = NAMES

    def load_model(self, spec: ModelSpec, examples: Examples, device: str | None) -> Any:
        """Load a sequence classifier with one output."""
        config = with_labels(spec, ["reward"], "regression")
        return load_model(
            spec, device=device, kind=self.kind(), config=config, missing=self.missing
        )

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Measure how well the scores tell the better reply."""
        return measure_rewards(model, processor, rows, format, spec, longest)

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return prompts with the replies that are preferred."""
        encoded = [encode_reply(row, "chosen", processor, longest) for row in rows]
        return held_out_batches(encoded, size, processor.pad_token_id, model.device, PROBED)
