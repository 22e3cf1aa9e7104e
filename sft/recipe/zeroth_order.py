"""The `zeroth_order:` section: fields of ZerothOrderConfig, and what cannot be joined with it."""

from __future__ import annotations

import dataclasses
from typing import Any

from sft.errors import unknown_name
from sft.optim.zeroth_order.config import OBJECTIVES, ZerothOrderConfig
from sft.recipe.fields import check_fields, key_error
from sft.recipe.schema import Recipe
from sft.recipe.source import Source
from sft.run.trainable import build_method
from sft.zeroth_order.checks import backward_only

# Names of the training section that choose a first-order optimizer.
_OPTIMIZER_KEYS = ("optim", "optim_args", "optim_target_modules")


def resolve_zeroth_order(recipe: Recipe, source: Source) -> dict[str, Any] | None:
    """Check the section; return it with every default filled in, or None where it is absent.

    Args:
        recipe: its `method` has been checked.
        source: where the values were written.
    """
    if recipe.zeroth_order is None:
        return None
    fields = dict(recipe.zeroth_order)
    objective = fields.get("objective", "loss")
    if objective not in OBJECTIVES:  # a function has no name in YAML
        text = unknown_name(str(objective), OBJECTIVES, kind="objective")
        raise source.error("zeroth_order.objective", f"got {objective!r}: {text}")
    check_fields(source, "zeroth_order", ZerothOrderConfig, fields)
    if fields.get("seed") is None:
        fields["seed"] = recipe.seed
    known = {field.name for field in dataclasses.fields(ZerothOrderConfig)}
    try:
        config = ZerothOrderConfig(**fields)
    except ValueError as error:
        raise key_error(source, "zeroth_order", known, error) from error
    _check_method(recipe, config, source)
    _check_training(recipe, config, source)
    return config.plain()


def build_zeroth_order(section: dict[str, Any] | None) -> ZerothOrderConfig | None:
    """Build the ZerothOrderConfig of a resolved section; None trains by backward passes."""
    return None if section is None else ZerothOrderConfig(**section)


def _check_method(recipe: Recipe, config: ZerothOrderConfig, source: Source) -> None:
    """Refuse settings of the method that only a backward pass can serve, and masks of adapters."""
    method = build_method(recipe)
    for key, allowed in backward_only(method.config).items():
        value = getattr(method.config, key)
        raise source.error(
            f"method.{key}",
            f"got {value!r}, which zeroth_order cannot serve; set {allowed}",
        )
    if config.sparsity > 0 and method.saved:
        raise source.error(
            "zeroth_order.sparsity",
            f"got {config.sparsity} for {method.name}, an adapter, whose weights start at zero and "
            "would be frozen as soon as they move; set 0",
        )


def _check_training(recipe: Recipe, config: ZerothOrderConfig, source: Source) -> None:
    """Refuse the choice of an optimizer that would not run, and a decay that its rule forbids."""
    if config.update == "conservative" and recipe.training.get("weight_decay"):
        raise source.error(
            "training.weight_decay",
            f"got {recipe.training['weight_decay']!r}, which would move away from the point that "
            "zeroth_order.update=conservative compared; set 0",
        )
    for key in _OPTIMIZER_KEYS:
        if recipe.training.get(key) is not None:
            raise source.error(
                f"training.{key}",
                "names an optimizer, and zeroth_order has its own rule; set "
                "zeroth_order.update, and leave this out",
            )
