"""`sft schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft.commands.arguments import user_errors
from sft.errors import UserError


def schema(
    out: Annotated[Path | None, typer.Option("--out", help="File to write.")] = None,
) -> None:
    """Print the JSON schema of recipes, with every method and task.

    It holds keys, types, choices and texts. Editors with the YAML language server complete
    and check a recipe whose first line is `# yaml-language-server: $schema=recipe.schema.json`.

    For example:

        sft schema --out recipe.schema.json
    """
    with user_errors():
        import json

        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.tools.schema import HINT, recipe_schema

        text = json.dumps(recipe_schema(), indent=1) + "\n"
        if out is None:
            print(text, end="")
            return
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out: {out}: cannot be written ({error.strerror})") from error
        print(f"{out}: written; put this line first in a recipe:\n{HINT}{out.name}")
