"""The seam between a run and what it trains a model to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from sft.data.load import Examples
from sft.evaluation.spec import EvaluationSpec
from sft.recipe.schema import ModelSpec


class TaskOptions(BaseModel):
    """The keys under `task:` besides its name; a task with keys of its own has a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Task(Protocol):
    """What `task:` names: data it takes, trainer it uses, how a model is judged.

    A task is a class in a module of `sft.tasks` that has a `name`; nothing else needs to know it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line
    peft_type: ClassVar[str | None]  # PEFT's task_type for adapters
    formats: ClassVar[tuple[str, ...]]  # of examples, names of sft.data
    metrics: ClassVar[tuple[str, ...]]  # that evaluation.metrics may hold
    measured: ClassVar[tuple[str, ...]]  # those that are measured unless a recipe says which
    options_class: ClassVar[type[TaskOptions]]
    auto: ClassVar[str]  # transformers' class that loads the model
    sequences: ClassVar[int]  # that a row of the data makes
    from_random: ClassVar[bool]  # whether the model's own weights start at random

    def __init__(self, options: TaskOptions) -> None: ...

    def arguments_class(self) -> type:
        """Return the dataclass whose fields are the keys under `training:`."""

    def trainer_class(self) -> type:
        """Return the trainer, with our mix-in before it."""

    def check_data(self, examples: Examples, metrics: Sequence[str], key: str) -> None:
        """Raise UserError where the values of examples do not fit the task or its metrics.

        Args:
            examples: read.
            metrics: that they will be measured by.
            key: that names the metrics.
        """

    def load_processor(self, spec: ModelSpec) -> Any:
        """Load the tokenizer or the image processor of the model."""

    def load_model(self, spec: ModelSpec, examples: Examples, device: str | None) -> Any:
        """Load the model with the head that the task trains.

        Args:
            spec: the `model:` section.
            examples: for tasks whose head follows from the data, such as the number of classes.
            device: where a quantised model goes.
        """

    def heads(self, model: Any) -> list[str]:
        """Return the modules that start at random: trained densely, and saved, with an adapter."""

    def trainer_inputs(self, examples: Examples, processor: Any, arguments: Any) -> dict[str, Any]:
        """Return the trainer's keyword arguments that depend on the task: data sets, collator,
        processor, reward functions.
        """

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Judge a model by held-out rows.

        Args:
            model: in any mode, which is left as it was.
            processor: of `load_processor`.
            rows: a data set.
            format: of its rows.
            spec: the `evaluation:` section; its metrics are resolved.
            longest: tokens that are kept of a row.
        """

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return batches of model inputs, on its device, on which an exported model is compared.

        Args:
            model: that will be compared.
            processor: of `load_processor`.
            rows: a few rows of a data set.
            format: of its rows.
            size: rows of a batch.
            longest: tokens that are kept of a row.
        """
