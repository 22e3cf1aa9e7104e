"""`task: token-classification`: a model learns the tag of each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sft.data.load import Examples
from sft.evaluation import token_classification as tagging
from sft.evaluation.batches import IGNORED
from sft.evaluation.spec import EvaluationSpec
from sft.tasks.base import PROBED, evaluated, mapped
from sft.tasks.labelled import LabelledTask
from sft.tasks.labels import class_number


class TokenClassification(LabelledTask):
    """Tagging of words, such as the recognition of names; a word's first token has its tag."""

    name: ClassVar[str] = "token-classification"
    summary: ClassVar[str] = "a model learns the tag of each word"
    auto: ClassVar[str] = "AutoModelForTokenClassification"
    peft_type: ClassVar[str | None] = "TOKEN_CLS"
    formats: ClassVar[tuple[str, ...]] = ("token_classification",)
    metrics: ClassVar[tuple[str, ...]] = tagging.NAMES
    measured: ClassVar[tuple[str, ...]] = ("token_accuracy", "entity_f1")
    column: ClassVar[str] = "tags"

    def trainer_inputs(self, examples: Examples, processor: Any, arguments: Any) -> dict[str, Any]:
        """Tokenise the words, and give the first token of each the number of its tag."""
        from transformers import DataCollatorForTokenClassification

        names = self.names(examples) or []

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            found = processor(
                row["tokens"], is_split_into_words=True, truncation=True,
                max_length=self.options.max_length,
            )  # fmt: skip
            tags = [class_number(tag, names) for tag in row["tags"]]
            return dict(found) | {"labels": first_tokens(found.word_ids(), tags)}

        return {
            "train_dataset": mapped(examples.train, encode),
            "eval_dataset": mapped(evaluated(examples, arguments), encode),
            "processing_class": processor,
            "data_collator": DataCollatorForTokenClassification(processor),
        }

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Measure the tags of words."""
        return tagging.measure(model, processor, rows, format, spec, self.options.max_length)

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return words."""
        starts = range(0, min(PROBED * size, len(rows)), size)
        return [
            processor(
                rows[start : start + size]["tokens"], is_split_into_words=True, padding=True,
                truncation=True, max_length=self.options.max_length, return_tensors="pt",
            ).to(model.device)
            for start in starts
        ]  # fmt: skip


def first_tokens(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Return the label of each token: its word's tag for the first of a word, else -100."""
    before = [None, *words[:-1]]
    return [
        tags[word] if word is not None and word != last else IGNORED
        for word, last in zip(words, before, strict=True)
    ]
