"""Metrics of a task, and forgetting, each time a Trainer evaluates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

Measure = Callable[[Any], Mapping[str, float]]


class MeasureOnEvaluate(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Adds what it measures to the metrics of an evaluation, and to the Trainer's log.

    So that `metric_for_best_model: eval_exact_match` works, and trackers see it. All processes
    measure, and find the same.

        trainer.add_callback(MeasureOnEvaluate(trainer, [lambda model: {"exact_match": ...}]))

    Args:
        trainer: whose evaluations these are.
        measures: given the model; return values by name, to which "eval_" is put.
        say: takes a line for each evaluation.
    """

    def __init__(
        self,
        trainer: Any,
        measures: list[Measure],
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.trainer, self.measures, self.say = trainer, measures, say

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """Measure, and log."""
        metrics = {} if metrics is None else metrics
        ended = (name for name in metrics if name.endswith("_runtime"))
        prefix = next(ended, "eval_runtime").removesuffix("runtime")  # of a data set
        found = {prefix + k: v for m in self.measures for k, v in m(self.trainer.model).items()}
        metrics.update(found)
        self.trainer.log(dict(found))  # which adds to what it is given
        if state.is_world_process_zero:
            loss = {k: metrics[k] for k in (f"{prefix}loss",) if k in metrics}
            shown = "  ".join(f"{name} {value:.4g}" for name, value in (loss | found).items())
            self.say(f"  step {state.global_step}/{state.max_steps}  {shown}")
