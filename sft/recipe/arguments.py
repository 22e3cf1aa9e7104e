"""The `training:` section: fields of the task's trainer verbatim, over defaults that fit."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from sft.errors import one_line
from sft.processes import count
from sft.recipe.deepspeed import prepare_processes, resolve_deepspeed
from sft.recipe.fields import check_fields
from sft.recipe.schema import Recipe
from sft.recipe.source import Source
from sft.recipe.trackers import check_trackers
from sft.tasks.find import build_task

# Set by other sections of the recipe, or by the trainer itself.
OWNED_ELSEWHERE = {"model_init_kwargs", "trust_remote_code", "seed", "disable_tqdm"}


def resolve_training(recipe: Recipe, source: Source, name: str) -> dict[str, Any]:
    """Check the section and lay it over our defaults; what comes back is what is printed."""
    owner = build_task(recipe.task).arguments_class()
    for key in OWNED_ELSEWHERE & recipe.training.keys():
        where = {"seed": "the top-level `seed`", "disable_tqdm": "`sft train --plain`"}
        raise source.error(f"training.{key}", f"is set by {where.get(key, 'the `model` section')}")
    check_fields(source, "training", owner, recipe.training)
    resolved = {"output_dir": f"runs/{name}"} | machine_defaults(owner) | recipe.training
    if resolved.get("deepspeed"):
        resolved["deepspeed"] = resolve_deepspeed(resolved["deepspeed"], source)
        if recipe.method["name"] == "full":  # what is saved is the model, whole
            zero = resolved["deepspeed"]["zero_optimization"]
            whole = (
                {"stage3_gather_16bit_weights_on_model_save": True} if zero["stage"] == 3 else {}
            )
            resolved["deepspeed"]["zero_optimization"] = whole | zero
        if not torch.accelerator.is_available():
            resolved.setdefault("use_cpu", True)
    if recipe.training.get("gradient_checkpointing") is not None:  # the old name is in use
        resolved.pop("activation_checkpointing", None)
    try:
        build_arguments(recipe.model_copy(update={"training": resolved}))
    except (ValueError, ImportError) as error:
        raise source.error("training", one_line(error)) from error
    return resolved


def machine_defaults(owner: Any) -> dict[str, Any]:
    """Return our defaults where TRL's assume a recent GPU or a metrics service.

    TRL turns bf16 and gradient checkpointing on; on a CPU fp32 is faster than bf16, and sparse
    training keeps few activations in the first place.

    Args:
        owner: the dataclass of the section.
    """
    gpu = torch.cuda.is_available()
    renamed = "activation_checkpointing" in {field.name for field in fields(owner)}
    together = {"use_cpu": True} if count() > 1 and not torch.accelerator.is_available() else {}
    return {
        **together,  # processes on CPUs find one another when told so
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "activation_checkpointing" if renamed else "gradient_checkpointing": False,
        "dataloader_pin_memory": gpu,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": "none",
    }


def build_arguments(recipe: Recipe, *, runs: bool = False) -> Any:
    """Build the training arguments of a recipe, of the class that its task's trainer takes.

    Args:
        recipe: its `training:` section is resolved.
        runs: a run follows. DeepSpeed is else left out: it would start processes to be asked.
    """
    given = dict(recipe.training)
    if runs:
        check_trackers(given.get("report_to"))
    if given.get("deepspeed") and runs:
        prepare_processes()
    elif not runs:
        given.pop("deepspeed", None)
    if given.get("resume_from_checkpoint") == "auto":
        given["resume_from_checkpoint"] = None  # the run looks for a checkpoint itself
    owner = build_task(recipe.task).arguments_class()
    return owner(**given, seed=recipe.seed, disable_tqdm=True)
