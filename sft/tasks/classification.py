"""`task: classification`: a model learns the classes, or the value, of a text or two texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sft.data.load import Examples
from sft.errors import UserError
from sft.evaluation import classification, label_sets, labels, values
from sft.evaluation.classification import batches
from sft.evaluation.label_sets import one_each
from sft.evaluation.spec import EvaluationSpec
from sft.recipe.schema import ModelSpec
from sft.tasks.base import PROBED, evaluated, mapped
from sft.tasks.labelled import LabelledTask
from sft.tasks.labels import class_number

# by transformers' `problem_type`: what its labels are, what measures them, and the metrics
KINDS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "regression": ("real numbers", values.measure, values.NAMES),
    "single_label_classification": ("classes", classification.measure, labels.NAMES),
    "multi_label_classification": ("lists of classes", label_sets.measure, label_sets.NAMES),
}


class Classification(LabelledTask):
    """Sequence classification: of one class each, of any number, or regression.

    Labels that are lists are of any number of classes, real numbers are values to learn.
    """

    name: ClassVar[str] = "classification"
    summary: ClassVar[str] = "a model learns the classes, or the value, of a text or two texts"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str | None] = "SEQ_CLS"
    formats: ClassVar[tuple[str, ...]] = ("classification",)
    metrics: ClassVar[tuple[str, ...]] = (*labels.NAMES, "micro_f1", *values.NAMES)
    measured: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "mse", "pearson")

    def check_data(self, examples: Examples, metrics: Sequence[str], key: str) -> None:
        """Raise UserError on metrics of the other kind of labels, and on labels of no class."""
        super().check_data(examples, metrics, key)
        found, _, known = KINDS[self.problem(examples)]
        wrong = [name for name in metrics if name not in known]
        if wrong and set(metrics) != set(self.measured):
            raise UserError(
                f"{key}: got {wrong[0]}, but the labels are {found}; allowed is {', '.join(known)}"
            )

    def problem(self, examples: Examples) -> str:
        """Return what transformers calls the kind of problem that labels pose."""
        several = isinstance(next(iter(examples.train))[self.column], list)
        return "multi_label_classification" if several else super().problem(examples)

    def load_model(self, spec: ModelSpec, examples: Examples, device: str | None) -> Any:
        """Load a sequence classifier with an output for each class of the data."""
        model = super().load_model(spec, examples, device)
        if model.config.get_text_config().pad_token_id is None:  # tells where a text ends
            model.config.get_text_config().pad_token_id = self.load_processor(spec).pad_token_id
        return model

    def trainer_inputs(self, examples: Examples, processor: Any, arguments: Any) -> dict[str, Any]:
        """Tokenise the texts, and number the classes."""
        from transformers import DataCollatorWithPadding

        names, problem = self.names(examples), self.problem(examples)

        def number(label: Any) -> Any:
            if names is None:
                return float(label)
            if problem != "multi_label_classification":
                return class_number(label, names)
            return one_each([class_number(each, names) for each in label], len(names))

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            found = dict(
                processor(
                    row["text"], row.get("text_pair"), truncation=True,
                    max_length=self.options.max_length,
                )
            )  # fmt: skip
            return found | {"labels": number(row["label"])}

        return {
            "train_dataset": mapped(examples.train, encode),
            "eval_dataset": mapped(evaluated(examples, arguments), encode),
            "processing_class": processor,
            "data_collator": DataCollatorWithPadding(processor),
        }

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Measure predicted classes, or values: what of the metrics fits the labels."""
        _, judge, known = KINDS[model.config.problem_type or "single_label_classification"]
        fitting = spec.model_copy(
            update={"metrics": [name for name in spec.metrics or () if name in known]}
        )
        found: dict[str, float] = judge(
            model, processor, rows, format, fitting, self.options.max_length
        )
        return found

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return texts."""
        few = rows.select(range(min(PROBED * size, len(rows))))
        found = batches(processor, few, format, size, self.options.max_length)
        return [{k: v.to(model.device) for k, v in batch.items()} for batch in found]
