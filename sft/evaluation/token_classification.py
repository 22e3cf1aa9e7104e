"""How right the tags of words are: `token_accuracy`, `token_f1`, `entity_f1`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sft.evaluation.classification import class_of
from sft.evaluation.metrics import evaluating
from sft.evaluation.spec import EvaluationSpec

NAMES = ("token_accuracy", "token_f1", "entity_f1")
OUTSIDE = "O"

Tags = Sequence[Sequence[str]]  # of the words of each row


def measure(
    model: Any, tokenizer: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
) -> dict[str, float]:
    """Return the metrics that `spec` names, of `NAMES`; a word has the tag of its first token.

    Args:
        model: a token classifier.
        tokenizer: a fast one: it tells which word a token is of.
        rows: with `tokens`, the words, and `tags`, numbers or names.
        format: of the rows.
        spec: the `evaluation:` section.
        longest: tokens kept of a row; words behind them do not count.
    """
    names = model.config.id2label
    actual = [[names[class_of(tag, model.config)] for tag in row["tags"]] for row in rows]
    predicted = predict(model, tokenizer, rows, spec.batch_size, longest)
    cut = [tags[: len(found)] for tags, found in zip(actual, predicted, strict=True)]
    return tag_metrics(predicted, cut, spec.metrics or ())


def tag_metrics(predicted: Tags, actual: Tags, names: Sequence[str]) -> dict[str, float]:
    """Return the named metrics of tags."""
    known = {"token_accuracy": token_accuracy, "token_f1": token_f1, "entity_f1": entity_f1}
    return {name: known[name](predicted, actual) for name in names}


def token_accuracy(predicted: Tags, actual: Tags) -> float:
    """Return the share of words with the right tag."""
    pairs = _pairs(predicted, actual)
    return sum(p == a for p, a in pairs) / max(len(pairs), 1)


def token_f1(predicted: Tags, actual: Tags) -> float:
    """Return F1 over words of the tags other than "O", all tags together."""
    pairs = _pairs(predicted, actual)
    right = sum(p == a != OUTSIDE for p, a in pairs)
    tagged = sum((p != OUTSIDE) + (a != OUTSIDE) for p, a in pairs)
    return 2 * right / max(tagged, 1)


def entity_f1(predicted: Tags, actual: Tags) -> float:
    """Return F1 over entities, right when kind, begin and end are (CoNLL-2003's measure)."""
    pairs = [(entities(p), entities(a)) for p, a in zip(predicted, actual, strict=True)]
    right = sum(len(p & a) for p, a in pairs)
    return 2 * right / max(sum(len(p) + len(a) for p, a in pairs), 1)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (kind, begin, end) of each entity; tags are "B-kind", "I-kind", "O", or bare kinds.

    An entity begins at a B, and at a tag of another kind than the one before.
    """
    found, begin = set(), 0
    split = [_split(tag) for tag in tags]
    for i, (mark, kind) in enumerate(split):
        if i and (kind != split[i - 1][1] or mark == "B"):
            found.add((split[i - 1][1], begin, i))
            begin = i
    if split:
        found.add((split[-1][1], begin, len(split)))
    return {entity for entity in found if entity[0] != OUTSIDE}


@torch.no_grad()
def predict(model: Any, tokenizer: Any, rows: Any, size: int, longest: int) -> list[list[str]]:
    """Return the tags of the words of each row."""
    found: list[list[str]] = []
    names = model.config.id2label
    with evaluating(model):
        for start in range(0, len(rows), size):
            words = [rows[i]["tokens"] for i in range(start, min(start + size, len(rows)))]
            batch = tokenizer(
                words, is_split_into_words=True, return_tensors="pt", padding=True,
                truncation=True, max_length=min(longest, tokenizer.model_max_length),
            )  # fmt: skip
            tags = model(**batch.to(model.device)).logits.argmax(-1).tolist()
            found += [_by_word(tags[i], batch.word_ids(i), names) for i in range(len(words))]
    return found


def _by_word(tags: list[int], words: list[int | None], names: dict[int, str]) -> list[str]:
    """Return the tag of the first token of each word; a word of no token is outside."""
    first: dict[int, str] = {}
    for tag, word in zip(tags, words, strict=True):
        if word is not None:
            first.setdefault(word, names[tag])
    return [first.get(word, OUTSIDE) for word in range(max(first, default=-1) + 1)]


def _pairs(predicted: Tags, actual: Tags) -> list[tuple[str, str]]:
    rows = zip(predicted, actual, strict=True)
    return [pair for p, a in rows for pair in zip(p, a, strict=True)]


def _split(tag: str) -> tuple[str, str]:
    """Return mark and kind of a tag."""
    mark, dash, kind = tag.partition("-")
    return (mark, kind) if dash and mark in ("B", "I") else ("", tag)
