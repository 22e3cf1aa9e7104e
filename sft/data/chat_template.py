"""The chat template that a recipe gives in place of the tokenizer's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UserError, one_line

if TYPE_CHECKING:  # which loads templates itself
    from sft.data.load import Examples

ENDINGS = (".jinja", ".jinja2", ".j2")


def read_template(given: str) -> str:
    """Return a template: the text of a file, or what is given itself.

    Args:
        given: `model.chat_template`; without a brace it is a path.

    Raises:
        UserError: there is no such file, or the template is not Jinja.
    """
    from jinja2 import Environment, TemplateSyntaxError

    text = given
    if given.endswith(ENDINGS) or "{" not in given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(
                f"model.chat_template: {given}: no such file; give a .jinja file or a template"
            )
        text = path.read_text(encoding="utf-8")
    try:  # `generation` is how templates mark what the assistant says
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_marks(text))
    except TemplateSyntaxError as error:
        raise UserError(
            f"model.chat_template: line {error.lineno}: {one_line(error)}; mend the template"
        ) from error
    return text


def check_template(data: Examples, tokenizer: Any, name: str) -> None:
    """Raise UserError on conversations that no template writes as text.

    Args:
        data: of a run.
        tokenizer: of its model.
        name: of the model, for the message.
    """
    row: dict[str, Any] = next(iter(data.first(1)), {})
    keys = [key for key in ("messages", "prompt", "chosen") if isinstance(row.get(key), list)]
    if keys and hasattr(tokenizer, "apply_chat_template") and not tokenizer.chat_template:
        raise UserError(
            f"model.chat_template: {name} brings none, and {keys[0]!r} of the data holds "
            "conversations; give a .jinja file or a template"
        )


def _without_marks(text: str) -> str:
    for mark in ("generation", "endgeneration"):
        for begin, end in (("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")):
            text = text.replace(f"{begin} {mark} {end}", "")
    return text
