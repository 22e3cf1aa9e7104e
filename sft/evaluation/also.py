"""Other data that a run judges its model by, such as questions with several answers."""

from __future__ import annotations

from typing import Any

from sft.evaluation import multiple_choice
from sft.evaluation.spec import EvaluationSpec


class Also:
    """The data of `evaluation.also`, read.

    Args:
        spec: the `evaluation:` section.
        task: judges what is in its formats; questions with choices any language model answers.

    Raises:
        UserError: data are missing, malformed, or of no use to the task.
    """

    def __init__(self, spec: EvaluationSpec, task: Any) -> None:
        self.spec, self.task = spec, task
        self.rows = {name: self._read(name, path) for name, path in spec.also.items()}

    def measure(self, model: Any, processor: Any, longest: int) -> dict[str, float]:
        """Return the metrics of each, as `NAME_metric`.

        Args:
            model: as the task takes it.
            processor: of the model.
            longest: tokens kept of a row.
        """
        found: dict[str, float] = {}
        for name, (rows, format) in self.rows.items():
            choices = format == "multiple_choice"
            metrics = list(multiple_choice.NAMES if choices else self.task.measured)
            spec = self.spec.model_copy(update={"metrics": metrics})
            judge = multiple_choice.measure if choices else self.task.measure
            values = judge(model, processor, rows, format, spec, longest)
            found |= {f"{name}_{metric}": value for metric, value in values.items()}
        return found

    def _read(self, name: str, path: str) -> tuple[Any, str]:
        from sft.data.load import load_data
        from sft.data.spec import DataSpec

        key = f"evaluation.also.{name}"
        found = load_data(DataSpec(train=path), 0, readable(self.task), key=key)
        count = min(self.spec.num_examples or len(found.train), len(found.train))
        return found.train.select(range(count)), found.format


def readable(task: Any) -> tuple[str, ...]:
    """Return the formats that a model of a task can be judged by."""
    asks = task.peft_type == "CAUSAL_LM" and "multiple_choice" not in task.formats
    return (*task.formats, *(["multiple_choice"] if asks else []))
