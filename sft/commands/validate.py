"""`sft validate`: check a recipe."""

from __future__ import annotations

from sft.commands.arguments import Overrides, RecipeArgument, user_errors


def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe, every key of it; loads neither data nor model.

    For example:

        sft validate my.yaml
    """
    with user_errors():
        from sft.quiet import quiet_libraries
        from sft.recipe.load import load_recipe

        quiet_libraries()
        load_recipe(recipe, overrides or [])
        print(f"{recipe}: ok")
