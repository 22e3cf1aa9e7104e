"""Find recipes: a file's path, or the name of one shipped with the package."""

from __future__ import annotations

from pathlib import Path

from sft.errors import RecipeError, unknown_name

SHIPPED = Path(__file__).parents[1] / "recipes"


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file of a recipe."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name_or_path}.yaml"
    if path.name == str(name_or_path) and shipped.is_file():
        return shipped
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder; give the recipe file in it")
    names = [name for name, _ in shipped_recipes()]
    raise RecipeError(
        f"{name_or_path}: no such file, nor a shipped recipe: "
        f"{unknown_name(str(name_or_path), names, kind='name')}"
    )


def shipped_recipes() -> list[tuple[str, str]]:
    """List the shipped recipes, as (name, first comment line)."""
    found = []
    for path in sorted(SHIPPED.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found.append((path.stem, first.lstrip("# ").rstrip()))
    return found
