"""Which of several answers a language model finds likeliest: `choice_accuracy` and `..._norm`."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from sft.data.encode import Encoded, encode
from sft.errors import UserError
from sft.evaluation.likelihood import completion_log_probs
from sft.evaluation.metrics import evaluating
from sft.evaluation.spec import EvaluationSpec

NAMES = ("choice_accuracy", "choice_accuracy_norm")


def measure(
    model: Any, tokenizer: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
) -> dict[str, float]:
    """Return the metrics that `spec` names, of `NAMES`.

    choice_accuracy is the share of questions whose right answer has the highest log p(answer |
    question); choice_accuracy_norm divides that by the answer's length in bytes before (as
    lm-evaluation-harness' acc and acc_norm do).

    Args:
        model: a causal language model.
        tokenizer: its own.
        rows: with `question`, `choices`, and `answer`: a position from 0, a letter, or the choice.
        format: of the rows.
        spec: the `evaluation:` section.
        longest: tokens kept of question and answer.
    """
    right = [answer_of(row, i) for i, row in enumerate(rows)]
    scored = scores(model, tokenizer, rows, spec.batch_size, longest)
    lengths = [[max(len(c.encode()), 1) for c in row["choices"]] for row in rows]
    by_length = [
        [score / length for score, length in zip(*pair, strict=True)]
        for pair in zip(scored, lengths, strict=True)
    ]
    found = {
        "choice_accuracy": _share(scored, right),
        "choice_accuracy_norm": _share(by_length, right),
    }
    return {name: found[name] for name in spec.metrics or ()}


def scores(model: Any, tokenizer: Any, rows: Any, size: int, longest: int) -> list[list[float]]:
    """Return log p(choice | question) of the choices of each row."""
    counts = [len(row["choices"]) for row in rows]
    pairs = [
        _encoded(row["question"], c, tokenizer, longest) for row in rows for c in row["choices"]
    ]
    with evaluating(model):
        found = completion_log_probs(model, pairs, size, tokenizer.pad_token_id)
    values = iter(total for total, _ in found)
    return [[next(values) for _ in range(count)] for count in counts]


def answer_of(row: dict[str, Any], index: int) -> int:
    """Return the position of the right choice.

    Raises:
        UserError: the answer is none of the choices.
    """
    answer, choices = row["answer"], list(row["choices"])
    if isinstance(answer, str):
        letters = string.ascii_uppercase[: len(choices)]
        if answer in choices:
            return choices.index(answer)
        if len(answer) == 1 and answer.upper() in letters:
            return letters.index(answer.upper())
        answer = int(answer) if answer.isdigit() else -1
    if not 0 <= answer < len(choices):
        raise UserError(
            f"answer: got {row['answer']!r} in example {index + 1}, allowed is 0 to "
            f"{len(choices) - 1}, a letter, or one of the choices; mend the data"
        )
    return int(answer)


def _encoded(question: str, choice: str, tokenizer: Any, longest: int) -> Encoded:
    """Encode a pair without an end of text; a space goes between where there is none."""
    space = "" if question[-1:].isspace() or choice[:1].isspace() else " "
    row = {"prompt": question, "completion": f"{space}{choice}{tokenizer.eos_token}"}
    found = encode(row, "prompt_completion", tokenizer, longest)
    ended = found.completion[-1:] == [tokenizer.eos_token_id]
    return Encoded(found.prompt, found.completion[:-1] if ended else found.completion, choice)


def _share(scored: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """Return how many questions have their highest score at the right choice."""
    hits = [max(range(len(s)), key=s.__getitem__) == r for s, r in zip(scored, right, strict=True)]
    return sum(hits) / max(len(hits), 1)
