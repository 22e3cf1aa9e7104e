"""`sft eval`: measure a model on data, and print what was found."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sft.data.load import Examples, load_data
from sft.data.origin import by_name
from sft.data.spec import DataSpec
from sft.errors import UserError, unknown_name
from sft.evaluation import multiple_choice
from sft.evaluation.also import readable
from sft.evaluation.forgetting import Forgetting, describe
from sft.evaluation.likelihood import perplexity
from sft.evaluation.log_probs import predicts_tokens
from sft.evaluation.spec import EvaluationSpec, ForgettingSpec
from sft.evaluation.target import (
    Target,
    as_tuned,
    find_target,
    open_processor,
    open_target,
    task_of,
)
from sft.tasks.find import has_classes
from sft.tasks.task import Task


def evaluate_target(
    name: str,
    *,
    base: str | None = None,
    recipe: str | None = None,
    data: str | None = None,
    metrics: list[str] | None = None,
    examples: int | None = None,
    compare: bool = False,
    forgetting: bool = False,
    device: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure what a name means.

    Args:
        name: of a run, an adapter, a delta or a model; see `find_target`.
        base: of an adapter or a delta.
        recipe: whose data, metrics and task count.
        data: a path or name as in `data.train`; default: the held-out examples of the recipe.
        metrics: default: those of the recipe, or of the task.
        examples: so many of them; default: as in the recipe, or all.
        compare: measure the base of an adapter as well.
        forgetting: read general text as well.
        device: where to compute.
        **settings: over those of the recipe's `evaluation:` section.

    Returns:
        `target`, `task`, `data`, `examples`, `metrics`, and, if asked for, `base`, `forgetting`.
    """
    target = find_target(name, base=base, recipe=recipe)
    task = task_of(target)
    rows = _examples(target, task, data)
    spec = _spec(target, task, rows.format, metrics, examples, settings)
    held_out = _first(rows.held_out, spec.num_examples)
    if rows.format in task.formats:
        task.check_data(rows, spec.metrics or (), "--metrics" if metrics else "evaluation.metrics")
    processor = open_processor(target, task)
    model = open_target(target, task, rows, device)
    _check_compare(model, name, compare)
    longest = (target.recipe.training.get("max_length", 1024) if target.recipe else 1024) or 10**9

    def judge() -> dict[str, float]:
        if rows.format == "multiple_choice":
            return multiple_choice.measure(model, processor, held_out, rows.format, spec, longest)
        return task.measure(model, processor, held_out, rows.format, spec, longest)

    report: dict[str, Any] = {
        "target": name, "task": target.task, "data": data or _data_of(target),
        "examples": len(held_out),
    }  # fmt: skip
    with as_tuned(model):
        report["metrics"] = judge()
    if compare:
        with model.disable_adapter():
            report["base"] = judge()
    if forgetting:
        report["forgetting"] = _forgetting(target, model, processor)
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """Print what was found as a table."""
    table = Table(title=f"{report['target']} on {report['data']}, {report['examples']:,} examples")
    table.add_column("metric")
    columns = ["base", "metrics"] if "base" in report else ["metrics"]
    for column in columns:
        table.add_column("base" if column == "base" else "value", justify="right")
    for metric in report["metrics"]:
        table.add_row(metric, *(f"{report[column][metric]:.4f}" for column in columns))
    console.print(table)
    if (section := report.get("forgetting")) is not None:
        line = describe(section) if "kl" in section else _text_alone(section)
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def as_json(report: dict[str, Any]) -> str:
    """Return what was found as JSON."""
    return json.dumps(report, indent=2)


def _examples(target: Target, task: Task, data: str | None) -> Examples:
    """Return what is measured as `held_out`."""
    if data is not None:
        found = load_data(DataSpec(train=data), 0, readable(task), key="--data")
        tells = found  # which classes there are
        if target.recipe is not None and target.adapter is not None and has_classes(task):
            tells = load_data(target.recipe.data, target.recipe.seed, task.formats)
        held_out = found.train if tells is found else by_name(found.train)
        return Examples(
            tells.train, held_out, found.format,
            train_at=tells.train_at, held_out_at=found.train_at,
        )  # fmt: skip
    if target.recipe is None:
        raise UserError(f"--data: {target.name} is of no run; give --data or --recipe")
    found = load_data(target.recipe.data, target.recipe.seed, task.formats)
    if found.held_out is None:
        raise UserError("--data: the recipe holds no examples out; give --data")
    return found


def _spec(
    target: Target,
    task: Task,
    format: str,
    metrics: list[str] | None,
    examples: int | None,
    settings: dict[str, Any],
) -> EvaluationSpec:
    """Return the `evaluation:` section that counts, its metrics checked."""
    own = target.recipe.evaluation if target.recipe else EvaluationSpec()
    choices = format == "multiple_choice"
    allowed = multiple_choice.NAMES if choices else task.metrics
    for name in metrics or ():
        if name not in allowed:
            raise UserError(
                f"--metrics: got {name!r}: {unknown_name(name, allowed, kind='metric')}"
            )
    usual = multiple_choice.NAMES if choices else own.metrics or task.measured
    given = {key: value for key, value in settings.items() if value is not None}
    if examples is not None:
        given["num_examples"] = examples
    return own.model_copy(update={"metrics": list(metrics or usual), **given})


def _first(rows: Any, count: int | None) -> Any:
    return rows.select(range(min(count or len(rows), len(rows))))


def _check_compare(model: Any, name: str, compare: bool) -> None:
    if compare and not hasattr(model, "disable_adapter"):
        raise UserError(f"--compare: {name} is a whole model, which has no base; leave it out")


def _forgetting(target: Target, model: Any, processor: Any) -> dict[str, Any]:
    """Read general text with the model, and with its base where that is beneath it."""
    if not predicts_tokens(model):
        raise UserError(f"--forgetting: {target.name} predicts no text; leave it out")
    own = target.recipe.forgetting if target.recipe else None
    watch = Forgetting(own or ForgettingSpec(), processor, model)
    adapted = hasattr(model, "disable_adapter")
    with model.disable_adapter() if adapted else nullcontext():
        found = watch.read_base(model)
    if adapted:
        with as_tuned(model):
            return watch.report(model)
    return {
        "text": watch.spec.data, "tokens": watch.tokens, "loss": found.loss,
        "perplexity": perplexity(found.loss),
    }  # fmt: skip


def _text_alone(section: dict[str, Any]) -> str:
    return (
        f"{section['text']} text: loss {section['loss']:.4f}, perplexity "
        f"{section['perplexity']:.2f}, on {section['tokens']:,} tokens"
    )


def _data_of(target: Target) -> str:
    assert target.recipe is not None
    train = target.recipe.data.eval or target.recipe.data.train
    return Path(train).name if isinstance(train, str) else "held-out examples"
