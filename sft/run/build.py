"""Model and trainer of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft.data.load import Examples
from sft.errors import UserError
from sft.recipe.arguments import build_arguments
from sft.recipe.schema import Recipe
from sft.recipe.zeroth_order import build_zeroth_order
from sft.run.trainable import Trainable
from sft.tasks.task import Task


def attached(recipe: Recipe, task: Task, method: Trainable, model: Any) -> Any:
    """Ready the model for its method; two that do not fit are refused."""
    if model is not None:
        keep_heads(method.config, task.heads(model))
    try:
        return method.attach(model, recipe.model)
    except ValueError as error:
        raise UserError(f"method: does not fit {recipe.model.name}: {error}") from error


def keep_heads(config: Any, heads: Sequence[str]) -> None:
    """Let an adapter train, and save, modules that start at random."""
    if heads and hasattr(config, "modules_to_save"):
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads})


def build_trainer(
    recipe: Recipe,
    task: Task,
    model: Any,
    processor: Any,
    data: Examples,
    callbacks: Sequence[Any],
) -> Any:
    """Hand everything to the trainer of the task.

    Args:
        recipe: resolved.
        task: of the recipe.
        model: with the method on it.
        processor: tokenizer or image processor.
        data: of the recipe.
        callbacks: added to the trainer's own.
    """
    import datasets
    from transformers import PrinterCallback

    from sft.mark_checkpoints import MarkCheckpoints
    from sft.offload.config import OffloadConfig

    arguments = build_arguments(recipe, runs=True)
    config = build_zeroth_order(recipe.zeroth_order)
    datasets.disable_progress_bars()
    trainer = task.trainer_class()(
        model=model,
        args=arguments,
        callbacks=[*callbacks, *([] if config is not None else [MarkCheckpoints()])],
        zeroth_order=config,
        offload=None if recipe.offload is None else OffloadConfig(**recipe.offload.model_dump()),
        **task.trainer_inputs(data, processor, arguments),
    )
    trainer.remove_callback(PrinterCallback)
    if config is not None:
        trainer.zeroth_order_log.base = (recipe.model.name, recipe.model.revision)
    trainer.sparse_callback.notes = {"recipe": recipe.model_dump(mode="json")}
    return trainer


def train(trainer: Any, checkpoint: str | None) -> Any:
    """Train, from a checkpoint where one is named; what does not fit it is the user's error."""
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    except UserError:
        raise
    except ValueError as error:
        where = f"training.resume_from_checkpoint: {checkpoint}: " if checkpoint else ""
        raise UserError(f"{where}{error}") from error
