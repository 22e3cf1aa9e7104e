"""`task: dpo`: a language model learns to prefer one reply to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sft.data.load import Examples
from sft.evaluation.batches import held_out_batches
from sft.evaluation.preference import NAMES, Pair, encode_reply, measure_policy, reply_log_probs
from sft.evaluation.spec import EvaluationSpec
from sft.tasks.base import PROBED, TaskBase


class Preference(TaskBase):
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290) by TRL's DPOTrainer."""

    name: ClassVar[str] = "dpo"
    summary: ClassVar[str] = "a language model learns to prefer one reply to another"
    arguments: ClassVar[str] = "trl:DPOConfig"
    trainer: ClassVar[str] = "sft.trainers.preference:SparseDPOTrainer"
    sequences: ClassVar[int] = 2  # the chosen reply and the rejected one
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    metrics: ClassVar[tuple[str, ...]] = NAMES
    measured: ClassVar[tuple[str, ...]] = NAMES

    beta = 0.1
    reference: Pair | None = None  # log-probabilities of a model that has no way back

    def trainer_inputs(self, examples: Examples, processor: Any, arguments: Any) -> dict[str, Any]:
        """Hand over the rows, and note how strong the loss holds on to the reference."""
        self.beta = arguments.beta
        return super().trainer_inputs(examples, processor, arguments)

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Measure how well the implicit rewards tell the better reply."""
        given = (model, processor, rows)
        if not hasattr(model, "disable_adapter") and self.reference is None:
            self.reference = reply_log_probs(*given, spec, longest)
        return measure_policy(
            *given, format, spec, longest, beta=self.beta, reference=self.reference
        )

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return prompts with the replies that are preferred."""
        encoded = [encode_reply(row, "chosen", processor, longest) for row in rows]
        return held_out_batches(encoded, size, processor.pad_token_id, model.device, PROBED)
