"""What a run notes of its model besides metrics: what it forgets, and what it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.evaluation.also import Also
from sft.evaluation.callback import Measure, MeasureOnEvaluate
from sft.evaluation.forgetting import Forgetting, alert, describe
from sft.evaluation.log_probs import predicts_tokens
from sft.evaluation.samples import lines, open_samples

if TYPE_CHECKING:
    from sft.run.job import Job


class Probes:
    """Forgetting and samples of a run, where its model predicts text and was not made up.

    Args:
        job: whose trainer is built.
    """

    def __init__(self, job: Job) -> None:
        self.job, recipe = job, job.recipe
        self.tokenizer = getattr(job.processor, "tokenizer", job.processor)
        self.forgetting, self.samples = None, None
        self.also, self.judged = Also(recipe.evaluation, job.task), dict[str, float]()
        if not predicts_tokens(job.model):
            return
        rows, format, spec = job.held_out, job.data.format, recipe.evaluation
        self.samples = open_samples(job.model, rows, format, self.tokenizer, spec, job.longest)
        if recipe.forgetting is not None and recipe.model.config is None:
            self.forgetting = Forgetting(recipe.forgetting, self.tokenizer, job.model)

    def before(self) -> None:
        """Probe the model with the method off."""
        job = self.job
        with job.method.untrained(job.model):
            self.judged = self._judge_also("also before")
            if self.samples is not None:
                self.samples.complete(job.model, "before")
            if self.forgetting is not None:
                with job.phases.phase("general text"):
                    found = self.forgetting.read_base(job.model)
                    job.phases.note(f"loss {found.loss:.4f} on {self.forgetting.tokens:,} tokens")

    def after(self) -> dict[str, Any]:
        """Probe the trained model, print what was found, and return sections of run.json."""
        job, forgotten, samples = self.job, None, []
        with job.method.trained(job.model):
            before, self.judged = self.judged, self._judge_also("also after")
            if self.samples is not None:
                self.samples.complete(job.model, "after")
                samples = self.samples.report()
            if self.forgetting is not None:
                with job.phases.phase("forgetting"):
                    forgotten = self.forgetting.report(job.model)
                    job.phases.note(describe(forgotten))
        for line in (*lines(samples), alert(forgotten)):
            if line is not None:
                self._say(line)
        also = {name: [before.get(name), value] for name, value in self.judged.items()}
        return {"forgetting": forgotten, "samples": samples, "also": also}

    def during(self) -> MeasureOnEvaluate | None:
        """Return the callback that measures whenever training evaluates, if there is anything."""
        job, recipe = self.job, self.job.recipe
        measures: list[Measure] = []
        if job.held_out is not None and recipe.evaluation.metrics:
            measures.append(job.judge)
        if self.also.rows:
            measures.append(self._also)
        if self.forgetting is not None and self.forgetting.spec.every == "eval":
            measures.append(self.forgetting.read)
        if recipe.training.get("eval_strategy", "no") == "no" or not measures:
            return None
        return MeasureOnEvaluate(job.trainer, measures, self._say)

    def _also(self, model: Any) -> dict[str, float]:
        return self.also.measure(model, self.job.processor, self.job.longest)

    def _judge_also(self, name: str) -> dict[str, float]:
        """Judge by the other data, and print what was found beside what was before."""
        if not self.also.rows:
            return {}
        with self.job.phases.phase(name):
            found = self._also(self.job.model)
            was = {key: f" (was {value:.4f})" for key, value in self.judged.items()}
            self.job.phases.note(
                ", ".join(f"{key} {value:.4f}{was.get(key, '')}" for key, value in found.items())
            )
        return found

    def _say(self, line: str) -> None:
        self.job.console.print(line, highlight=False, soft_wrap=True, markup=False)
