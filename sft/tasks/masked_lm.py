"""`task: masked-lm`: a model learns to fill in words that were taken out of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from sft.data.load import Examples
from sft.evaluation.likelihood import perplexity
from sft.evaluation.metrics import evaluating
from sft.evaluation.spec import EvaluationSpec
from sft.tasks.base import PROBED, TrainerTask, evaluated, mapped
from sft.tasks.task import TaskOptions

MASKS = 0  # seed of the masks that are measured: the same before and after


class MaskedOptions(TaskOptions):
    """How much is taken out, and how much of a text is read."""

    mask_probability: float = Field(default=0.15, gt=0, lt=1, description="share of the tokens")
    max_length: int = Field(default=512, gt=0, description="tokens kept of a text")


class MaskedLanguage(TrainerTask):
    """Masked language modelling, as BERT was pre-trained (Devlin et al., arXiv:1810.04805)."""

    name: ClassVar[str] = "masked-lm"
    summary: ClassVar[str] = "a model learns to fill in words that were taken out of a text"
    auto: ClassVar[str] = "AutoModelForMaskedLM"
    peft_type: ClassVar[str | None] = None  # which PEFT has no name for, nor needs one
    formats: ClassVar[tuple[str, ...]] = ("text",)
    metrics: ClassVar[tuple[str, ...]] = ("masked_nll", "masked_perplexity", "masked_accuracy")
    measured: ClassVar[tuple[str, ...]] = ("masked_nll", "masked_accuracy")
    options_class: ClassVar[type[TaskOptions]] = MaskedOptions

    def trainer_inputs(self, examples: Examples, processor: Any, arguments: Any) -> dict[str, Any]:
        """Tokenise the texts; each time one is read, other tokens are taken out."""
        evaluates = evaluated(examples, arguments)
        return {
            "train_dataset": mapped(examples.train, self._encode, processor=processor),
            "eval_dataset": mapped(evaluates, self._encode, processor=processor),
            "processing_class": processor,
            "data_collator": self._collator(processor, seed=None),
        }

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Measure what the model puts in place of masked tokens, always the same ones."""
        total, right, count = 0.0, 0, 0
        with evaluating(model), torch.no_grad():
            for batch in self._masked(processor, rows, spec.batch_size):
                labels = batch.pop("labels").to(model.device)
                logits = model(**{k: v.to(model.device) for k, v in batch.items()}).logits.float()
                there = labels != -100
                picked, wanted = logits[there], labels[there]
                total += float(torch.nn.functional.cross_entropy(picked, wanted, reduction="sum"))
                right += int((picked.argmax(-1) == wanted).sum())
                count += len(wanted)
        nll = total / max(count, 1)
        found = {
            "masked_nll": nll,
            "masked_perplexity": perplexity(nll),
            "masked_accuracy": right / max(count, 1),
        }
        return {name: found[name] for name in spec.metrics or ()}

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return texts with some tokens masked."""
        few = rows.select(range(min(PROBED * size, len(rows))))
        return [
            {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
            for batch in self._masked(processor, few, size)
        ]

    def _masked(self, processor: Any, rows: Any, size: int) -> Iterator[dict[str, Any]]:
        collate = self._collator(processor, seed=MASKS)
        for start in range(0, len(rows), size):
            part = [rows[i] for i in range(start, min(start + size, len(rows)))]
            yield dict(collate([self._encode(row, processor) for row in part]))

    def _encode(self, row: dict[str, Any], processor: Any) -> dict[str, Any]:
        return dict(processor(row["text"], truncation=True, max_length=self.options.max_length))

    def _collator(self, processor: Any, seed: int | None) -> Any:
        from transformers import DataCollatorForLanguageModeling

        share = self.options.mask_probability
        return DataCollatorForLanguageModeling(processor, mlm_probability=share, seed=seed)
