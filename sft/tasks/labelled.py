"""What tasks share whose examples have classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from sft.data.load import Examples
from sft.models import load_model
from sft.recipe.schema import ModelSpec
from sft.tasks.base import HeadTask
from sft.tasks.labels import check_labels, label_names, with_labels
from sft.tasks.task import TaskOptions


class LabelOptions(TaskOptions):
    """Which classes there are."""

    labels: list[str] | None = Field(
        default=None, description="names of the classes, in order; default: as the data has them"
    )


class TextLabelOptions(LabelOptions):
    """Which classes there are, and how much of a text is read."""

    max_length: int = Field(default=512, gt=0, description="tokens kept of a text")


class LabelledTask(HeadTask):
    """The defaults of a task that puts an output for each class of its data on a model."""

    column: ClassVar[str] = "label"
    options_class: ClassVar[type[TaskOptions]] = TextLabelOptions

    def names(self, examples: Examples) -> list[str] | None:
        """Return the names of the classes, or None where labels are real numbers."""
        return label_names(examples.train, self.column, self.options.labels)

    def problem(self, examples: Examples) -> str:
        """Return what transformers calls the kind of problem that labels pose."""
        return "regression" if self.names(examples) is None else "single_label_classification"

    def check_data(self, examples: Examples, metrics: Sequence[str], key: str) -> None:
        """Raise UserError on a label, most likely a held-out one, that is no class's."""
        names = self.options.labels or self.names(examples)
        for rows, at in (
            (examples.train, examples.train_at),
            (examples.held_out, examples.held_out_at),
        ):
            if names is not None and rows is not None and hasattr(rows, "__len__"):
                check_labels(rows, self.column, names, at, examples.format)

    def load_model(self, spec: ModelSpec, examples: Examples, device: str | None) -> Any:
        """Load the model with an output for each class of the data."""
        return load_model(
            spec,
            device=device,
            kind=self.kind(),
            config=with_labels(spec, self.names(examples), self.problem(examples)),
            missing=self.missing,
        )
