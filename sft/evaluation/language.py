"""How good a language model is, by whatever its data can tell."""

from __future__ import annotations

from typing import Any

from sft.data.encode import encode
from sft.errors import UserError
from sft.evaluation import completions, likelihood, multiple_choice
from sft.evaluation.metrics import evaluate
from sft.evaluation.spec import EvaluationSpec

NAMES = (*likelihood.NAMES, *completions.NAMES, *multiple_choice.NAMES)


def measure(
    model: Any, tokenizer: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
) -> dict[str, float]:
    """Return the metrics that `spec` names, of `NAMES`.

    Args:
        model: a causal language model.
        tokenizer: its own.
        rows: a data set.
        format: of the rows: "multiple_choice", or what `sft.data.encode.encode` takes.
        spec: the `evaluation:` section.
        longest: tokens kept of a row.

    Raises:
        UserError: the rows cannot tell a metric.
    """
    asked = tuple(spec.metrics or ())
    choices = format == "multiple_choice"
    allowed = multiple_choice.NAMES if choices else likelihood.NAMES + completions.NAMES
    for name in asked:
        if name not in allowed:
            raise UserError(
                f"evaluation.metrics: got {name} of {format} examples, allowed is "
                f"{', '.join(allowed)}; change the metrics or the data"
            )
    if choices:
        return multiple_choice.measure(model, tokenizer, rows, format, spec, longest)
    encoded = [encode(row, format, tokenizer, longest) for row in rows]
    return evaluate(
        model, tokenizer, encoded, asked, max_new_tokens=spec.max_new_tokens,
        batch_size=spec.batch_size,
    )  # fmt: skip
