"""One job from recipe to exported model: load, measure, train, measure again, save, verify."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from sft.data.chat_template import check_template
from sft.data.load import Examples, load_data
from sft.data.preview import preview, show
from sft.data.summary import describe, section, skipped
from sft.data.vocabulary import check_ids
from sft.environment import check_kernels, versions
from sft.errors import UserError, one_line
from sft.processes import Team
from sft.recipe.expected import broken
from sft.recipe.load import to_yaml
from sft.recipe.schema import Recipe
from sft.report.log import RunLog
from sft.run import folder as run_folder
from sft.run.build import attached, build_trainer, train
from sft.run.finish import export, export_also, publish, report, save_adapter, trained_parts
from sft.run.phases import Phases
from sft.run.probes import Probes
from sft.run.progress import ProgressReport
from sft.run.put_together import is_sharding, put_together
from sft.run.trainable import build_method
from sft.tasks.find import build_task


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run achieved; written as run.json into its folder."""

    output_dir: Path
    before: dict[str, float]
    after: dict[str, float]
    trained_weights: int
    all_weights: int
    steps: int
    train_loss: float
    max_logit_difference: float | None  # reloaded merged folder against the model in memory
    seconds: dict[str, float]


def train_from_recipe(recipe: Recipe, console: Console | None = None) -> RunResult:
    """Run a resolved recipe (see `load_recipe`).

    Args:
        recipe: What to do.
        console: Where progress is printed, default: standard output.

    Raises:
        UserError: When the recipe, its files and its model do not fit together.
    """
    check_kernels()
    _seed_everything(recipe.seed)
    job = Job(recipe, console)
    job.load()
    job.build()
    before = job.measure("before")
    job.probes.before()
    outcome = job.train()
    result = RunResult(
        job.output, before, {}, *job.counts, outcome.global_step, outcome.training_loss, None,
        job.phases.seconds,
    )  # fmt: skip
    whole = job.gather()
    job.team.leave()  # what follows, and takes a while, each process does alone
    if whole:  # where it was put together, the first process has the last word
        result = job.conclude(result)
    return result


class Job:
    """A recipe at work; stage after stage fills it with what the next ones need.

    Args:
        recipe: resolved.
        console: where the first process prints.
    """

    data: Examples
    held_out: Any | None  # rows that are measured
    processor: Any
    model: Any
    trainer: Any
    example: dict[str, Any]  # the first one, as the trainer has it
    probes: Probes
    counts: tuple[int, int]  # trained weights, and all that they are a part of

    def __init__(self, recipe: Recipe, console: Console | None = None) -> None:
        self.recipe = recipe
        self.team = Team(cpu=bool(recipe.training.get("use_cpu")))
        self.console = (console or Console()) if self.team.first else Console(quiet=True)
        self.phases = Phases(self.console)
        self.output = Path(recipe.training["output_dir"])
        self.checkpoint = run_folder.check(
            self.output,
            resume=recipe.training.get("resume_from_checkpoint"),
            overwrite=recipe.overwrite,
        )
        self.task, self.method = build_task(recipe.task), build_method(recipe)

    def load(self) -> None:
        """Load data first: its mistakes are the commonest and the quickest to find."""
        recipe, phases = self.recipe, self.phases
        with self.team.first_on_each_machine_first():
            with phases.phase("data"):
                self.data = load_data(recipe.data, recipe.seed, self.task.formats)
                metrics = recipe.evaluation.metrics or ()
                self.task.check_data(self.data, metrics, "evaluation.metrics")
                self.held_out = _measured(self.data.held_out, recipe.evaluation.num_examples)
                phases.note(describe(self.data))
            self._say(*skipped(self.data))
            with phases.phase("model"):
                self.processor = self.task.load_processor(recipe.model)
                check_template(self.data, self.processor, recipe.model.name)
                self.model = self._base()

    def _base(self) -> Any:
        """Return the model as it is loaded, or None where the method makes its own."""
        recipe = self.recipe
        if self.method.from_scratch:
            self.phases.note(f"{recipe.model.name}'s architecture, random weights")
            return None
        device = "cpu" if recipe.training.get("use_cpu") else None
        model = self.task.load_model(recipe.model, self.data, device)
        packed = recipe.model.quantization
        shown = model.dtype if packed is None else f"{packed.bits} and {model.dtype}"
        self.phases.note(f"{recipe.model.name}, {model.num_parameters():,} weights, {shown}")
        return model

    def _loaded(self) -> Any:
        """Return the model under an adapter, as it was loaded."""
        return self.task.load_model(self.recipe.model, self.data, None)

    def build(self) -> None:
        """Put the method on, build the trainer; once all fits, the folder is this run's."""
        recipe = self.recipe
        with self.phases.phase("method"):
            self.model = attached(recipe, self.task, self.method, self.model)
            self.counts = self.method.counts(self.model)
            progress = ProgressReport(self.console, prefix=f"{recipe.method['name']}_")
            try:
                self.trainer = build_trainer(
                    recipe,
                    self.task,
                    self.model,
                    self.processor,
                    self.data,
                    [progress, RunLog()],
                )
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"training: {one_line(error)}") from error
            check_ids(self.data, self.trainer.model)
            self.example = preview(self.trainer)
            self.probes = Probes(self)
            if (during := self.probes.during()) is not None:
                self.trainer.add_callback(during)
            self.team.wait()  # for all to have looked into the folder
            if self.team.first:
                run_folder.clear(self.output, keep_checkpoints=self.checkpoint is not None)
                (self.output / run_folder.RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
            self.phases.note(_trains(recipe, *self.counts))
        show(self.example, self.console)
        self._say(*self._unsaved())

    def _unsaved(self) -> list[str]:
        saves = self.method.saved or self.recipe.export.merged
        line = "export.merged is false: the weights stay in checkpoints and logs alone"
        return [] if saves else [line]

    def measure(self, name: str, former: dict[str, float] | None = None) -> dict[str, float]:
        """Judge the model by the held-out rows, and print the figures.

        Args:
            name: "before", with the method off, or "after", with the weights that were trained.
            former: figures to print beside.
        """
        spec = self.recipe.evaluation
        if self.held_out is None or not spec.metrics:
            return {}
        shape = self.method.untrained if name == "before" else self.method.trained
        with self.phases.phase(name), shape(self.model):
            found = self.judge(self.model)
            change = {key: f" (was {value:.4f})" for key, value in (former or {}).items()}
            shown = ", ".join(f"{k} {value:.4f}{change.get(k, '')}" for k, value in found.items())
            self.phases.note(f"{shown} on {len(self.held_out)} held-out examples")
        return found

    def judge(self, model: Any) -> dict[str, float]:
        """Return the metrics of a model on the held-out rows."""
        given = (model, self.processor, self.held_out, self.data.format)
        return self.task.measure(*given, self.recipe.evaluation, self.longest)

    def train(self) -> Any:
        """Train, and leave the terminal tidy whatever happens."""
        with self.phases.phase("train"):
            try:
                outcome = train(self.trainer, self.checkpoint)
            finally:
                for callback in self.trainer.callback_handler.callbacks:
                    if isinstance(callback, ProgressReport):
                        callback.close()
            self.phases.note(f"{outcome.global_step} steps, mean loss {outcome.training_loss:.3f}")
        return outcome

    def gather(self) -> bool:
        """Take the trained model as it is measured and exported; whether this process has it."""
        trainer, first = self.trainer, self.team.first
        if is_sharding(trainer):
            base = self._loaded if self.method.saved else None
            self.model = put_together(trainer, base, first=first)
        else:  # autocast stays on the trained model's forward
            self.model = trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return self.model is not None

    def conclude(self, result: RunResult) -> RunResult:
        """Save, measure and export the trained model; the first process alone writes."""
        difference = None
        if self.method.saved and self.team.first:
            save_adapter(self)
        if self.trainer.offloaded_base is not None and self.recipe.export.merged:
            self.trainer.offloaded_base.close()  # merging writes to the weights
            self.model.to("cpu")
        if self.data.streamed:
            self._say(*skipped(self.data))
        after, probed = self.measure("after", result.before), self.probes.after()
        if self.team.first:
            difference = export(self)
        result = dataclasses.replace(result, after=after, max_logit_difference=difference)
        if self.team.first:
            self._compare(after)
            data = section(self.data, self.trainer, self.example)
            notes = {
                "data": data,
                **probed,
                "support": trained_parts(self),
                "versions": versions(),
                "recipe": self.recipe.model_dump(),
            }
            run_folder.write_record(self.output, dataclasses.asdict(result) | notes)
            export_also(self)
            publish(self)  # tells what the record holds
            report(self)
        return result

    def _compare(self, after: dict[str, float]) -> None:
        """Say where the run stays behind what its recipe expects."""
        expected = self.recipe.expected
        self._say(*([] if expected is None else broken(expected.metrics, after)))

    def _say(self, *lines: str) -> None:
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def probe(self) -> Any:
        """Return inputs for the comparison of logits: held-out ones, or else training ones."""
        size = self.recipe.evaluation.batch_size
        rows = self.held_out if self.held_out is not None else self.data.first(2 * size)
        given = (self.model, self.processor, rows, self.data.format)
        return self.task.probe(*given, size, self.longest)

    @property
    def longest(self) -> int:
        """Tokens that training keeps of a row."""
        return self.recipe.training.get("max_length", 1024) or 10**9


def _seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; ask cuDNN for repeatable kernels, which costs little."""
    import torch
    from transformers import set_seed

    set_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _measured(held_out: Any | None, count: int | None) -> Any | None:
    """Return the held-out rows that are measured."""
    return None if held_out is None else _first(held_out, count or len(held_out))


def _first(rows: Any, count: int) -> Any:
    return rows.select(range(min(count, len(rows))))


def _trains(recipe: Recipe, trained: int, total: int) -> str:
    """Say what is trained, and by which way to a gradient."""
    text = f"{recipe.method['name']} trains {trained:,} of {total:,} weights"
    text += f" ({100 * trained / total:.3f} %)"
    if recipe.zeroth_order is None:
        return text
    sparsity = recipe.zeroth_order["sparsity"]
    masked = f", {100 * (1 - sparsity):g} % of each tensor" if sparsity else ""
    return f"{text} by forward passes{masked}"
