"""The formats of examples: which columns tell them, what a task gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sft.data import rows
from sft.errors import UserError

Check = Callable[[dict[str, Any], bool], None]
Convert = Callable[[dict[str, Any], bool], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """How examples are written.

    Args:
        needed: columns; of a tuple, any one, which is renamed to the first.
        check: raises ValueError on a malformed row.
        optional: columns that are kept where there are any; None: all.
        becomes: what a task gets, where that is another format.
        convert: makes a row of that format, where renaming is not enough.
        texts: whether columns of plain strings need no further look.
    """

    needed: tuple[tuple[str, ...], ...]
    check: Check
    optional: tuple[str, ...] | None = ()
    becomes: str | None = None
    convert: Convert | None = None
    texts: bool = False

    def chosen(self, columns: Iterable[str]) -> list[str] | None:
        """Return which of the columns it would read, or None where one lacks."""
        there = set(columns)
        found = [next((name for name in group if name in there), None) for group in self.needed]
        return None if None in found else [name for name in found if name is not None]

    def reads(self, columns: Sequence[str]) -> set[str]:
        """Return the columns that tell the format, with the optional ones; nothing if one lacks."""
        chosen = self.chosen(columns)
        if chosen is None:
            return set()
        return {*chosen, *(() if self.optional is None else self.kept(columns))}

    def kept(self, columns: Iterable[str]) -> list[str]:
        """Return the optional columns that are there."""
        needed = {group[0] for group in self.needed}
        rest = [name for name in columns if name not in needed]
        return rest if self.optional is None else [name for name in rest if name in self.optional]


KNOWN: dict[str, Format] = {
    "text": Format((("text",),), rows.check_text, texts=True),
    "prompt_completion": Format(
        (("prompt",), ("completion",)), rows.check_prompt_completion, ("tools",), texts=True
    ),
    "messages": Format((("messages",),), rows.check_messages, ("tools",)),
    "alpaca": Format(
        (("instruction",), ("output",)), rows.check_alpaca, ("input", "system"),
        becomes="prompt_completion", convert=rows.from_alpaca,
    ),
    "sharegpt": Format(
        (("conversations",),), rows.check_sharegpt, ("system",),
        becomes="messages", convert=rows.from_sharegpt,
    ),
    "preference": Format(
        (("chosen",), ("rejected",)), rows.check_preference, ("prompt", "tools")
    ),
    "prompt": Format((("prompt",),), rows.check_prompt, None, texts=True),
    "classification": Format(
        (("text",), ("label", "labels")), rows.check_classification, ("text_pair",)
    ),
    "token_classification": Format(
        (("tokens",), ("tags", "ner_tags", "labels")), rows.check_token_classification
    ),
    "image_classification": Format((("image",), ("label",)), rows.check_image),
    "seq2seq": Format(
        (("source",), ("target",)), rows.check_pair,
        becomes="prompt_completion", convert=rows.from_pair,
    ),
    "multiple_choice": Format((("question",), ("choices",), ("answer",)), rows.check_choices),
    "tokenised": Format(
        (("input_ids",),), rows.check_tokenised, ("labels", "attention_mask")
    ),
}  # fmt: skip


def canonical(name: str) -> str:
    """Return the format that a task gets of examples written in one."""
    return KNOWN[name].becomes or name


def detect_format(
    columns: Sequence[str],
    name: str,
    wanted: str = "auto",
    formats: Sequence[str] | None = None,
    named: Iterable[str] = (),
) -> str:
    """Return the format that columns spell.

    Of two that fit, the one that reads more columns is meant.

    Args:
        columns: of a source.
        name: of the source, for messages.
        wanted: what the recipe says, or "auto".
        formats: those that the task takes; default: any.
        named: columns that the recipe speaks of, which are meant to be read.

    Raises:
        UserError: none fits, or several do.
    """
    allowed = [f for f in KNOWN if formats is None or canonical(f) in formats]
    found = f"{name}: found the columns {', '.join(columns) or '(none)'}"
    if wanted != "auto":
        if wanted not in allowed:
            raise UserError(
                f"data.format: got {wanted}, the task takes {', '.join(allowed)}; change one"
            )
        if KNOWN[wanted].chosen(columns) is None:
            raise UserError(f"data.format: {found}; {wanted} needs {_spelt(wanted)}")
        return wanted
    fits = {f: read for f in allowed if (read := KNOWN[f].reads(columns))}
    meant = {f: read for f, read in fits.items() if set(named) <= read}
    fits = meant or fits
    best = [f for f, read in fits.items() if not any(read < other for other in fits.values())]
    if not best:
        spelt = "; ".join(f"{f}: {_spelt(f)}" for f in allowed)
        raise UserError(
            f"data.format: {found}; expected one of: {spelt}; rename columns by data.columns"
        )
    if len(best) > 1:
        raise UserError(f"data.format: {found}, which fit {' and '.join(best)}; set data.format")
    return best[0]


def _spelt(name: str) -> str:
    return " + ".join("|".join(group) for group in KNOWN[name].needed)
