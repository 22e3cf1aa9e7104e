"""The `forgetting:` section, where it depends on others."""

from __future__ import annotations

from sft.recipe.schema import Recipe
from sft.recipe.source import Source


def check_forgetting(recipe: Recipe, source: Source) -> None:
    """Refuse to measure at evaluations where there are none.

    Args:
        recipe: resolved.
        source: where the values were written.
    """
    wanted = recipe.forgetting is not None and recipe.forgetting.every == "eval"
    if wanted and recipe.training.get("eval_strategy", "no") == "no":
        raise source.error(
            "forgetting.every",
            "got eval, but training never evaluates; set training.eval_strategy, or every: run",
        )
