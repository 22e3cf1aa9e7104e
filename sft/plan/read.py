"""Read a recipe for a device that may not be here."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sft.plan.devices import Device
from sft.recipe.load import resolve
from sft.recipe.schema import Recipe
from sft.recipe.shipped import find_recipe
from sft.recipe.source import apply_overrides, read


def read_recipe(name: str, overrides: Iterable[str], device: Device) -> Recipe:
    """Return a resolved recipe as it would run on a device.

    On a GPU training runs under autocast to bfloat16 unless the recipe says otherwise, as it does
    where there is one.

    Args:
        name: a file, or the name of a shipped recipe.
        overrides: settings over it.
        device: where it is to run.

    Raises:
        RecipeError: on anything not understood.
    """
    path = find_recipe(name)
    source = apply_overrides(read(path), overrides)
    if device.kind == "gpu" and not torch.cuda.is_available():
        given = source.values.get("training")
        said = isinstance(given, dict) and {"bf16", "fp16"} & set(given)
        # the arguments refuse half precision without a device, except on a CPU that is asked for
        settings = ["training.use_cpu=true"] + ([] if said else ["training.bf16=true"])
        source = apply_overrides(source, settings)
    return resolve(source, path.stem)
