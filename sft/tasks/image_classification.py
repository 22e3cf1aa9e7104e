"""`task: image-classification`: a model learns what an image shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sft.data.load import Examples
from sft.evaluation import labels
from sft.evaluation.classification import batches, measure
from sft.evaluation.spec import EvaluationSpec
from sft.models import load_image_processor
from sft.recipe.schema import ModelSpec
from sft.tasks.base import PROBED, evaluated
from sft.tasks.labelled import LabelledTask, LabelOptions
from sft.tasks.labels import class_number
from sft.tasks.task import TaskOptions


class ImageClassification(LabelledTask):
    """Image classification; images are made pixels of batch by batch."""

    name: ClassVar[str] = "image-classification"
    summary: ClassVar[str] = "a model learns what an image shows"
    auto: ClassVar[str] = "AutoModelForImageClassification"
    peft_type: ClassVar[str | None] = None  # which PEFT has no name for
    formats: ClassVar[tuple[str, ...]] = ("image_classification",)
    metrics: ClassVar[tuple[str, ...]] = labels.NAMES
    measured: ClassVar[tuple[str, ...]] = ("accuracy", "f1")
    options_class: ClassVar[type[TaskOptions]] = LabelOptions

    def load_processor(self, spec: ModelSpec) -> Any:
        """Load the image processor."""
        return load_image_processor(spec)

    def trainer_inputs(self, examples: Examples, processor: Any, arguments: Any) -> dict[str, Any]:
        """Hand over images, which the collator makes pixels of."""
        import torch

        names = self.names(examples) or []
        arguments.remove_unused_columns = False  # the collator reads `image`
        arguments.include_num_input_tokens_seen = "no"  # pixels are not tokens

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            images = [row["image"].convert("RGB") for row in rows]
            numbers = [class_number(row["label"], names) for row in rows]
            return {
                "pixel_values": processor(images=images, return_tensors="pt")["pixel_values"],
                "labels": torch.tensor(numbers),
            }

        return {
            "train_dataset": examples.train,
            "eval_dataset": evaluated(examples, arguments),
            "processing_class": processor,
            "data_collator": collate,
        }

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Measure predicted classes."""
        return measure(model, processor, rows, "image_classification", spec, longest)

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return images."""
        few = rows.select(range(min(PROBED * size, len(rows))))
        found = batches(processor, few, "image_classification", size, longest)
        return [{k: v.to(model.device) for k, v in batch.items()} for batch in found]
