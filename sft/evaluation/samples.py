"""A few held-out prompts, and what the model makes of them before and after training."""

from __future__ import annotations

from typing import Any

from sft.data.encode import Encoded, encode
from sft.evaluation.completions import greedy
from sft.evaluation.log_probs import predicts_tokens
from sft.evaluation.metrics import evaluating
from sft.evaluation.preference import encode_reply
from sft.evaluation.spec import EvaluationSpec

BEGUN = 24  # tokens of plain text that are given as its prompt


class Samples:
    """Held-out prompts with their right completions, and the model's own.

    Args:
        rows: held-out rows; the first ones are taken.
        format: of the rows.
        tokenizer: of the model.
        spec: the `evaluation:` section.
        longest: tokens kept of a row.
    """

    def __init__(
        self, rows: Any, format: str, tokenizer: Any, spec: EvaluationSpec, longest: int
    ) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        chosen = rows.select(range(min(spec.samples, len(rows))))
        found = [_prompt(row, format, tokenizer, longest) for row in chosen]
        self.encoded = [example for example in found if example.prompt]
        self.completions: dict[str, list[str]] = {}

    def complete(self, model: Any, when: str) -> None:
        """Complete the prompts greedily.

        Args:
            model: a causal language model.
            when: "before" or "after".
        """
        size = self.spec.batch_size
        with evaluating(model):
            self.completions[when] = greedy(
                model, self.tokenizer, self.encoded, self.spec.max_new_tokens, size
            )

    def report(self) -> list[dict[str, str | None]]:
        """Return run.json's section `samples`."""
        return [
            {
                "prompt": self.tokenizer.decode(example.prompt, skip_special_tokens=True),
                "reference": example.reference or None,
                "before": self._completed("before", i),
                "after": self._completed("after", i),
            }
            for i, example in enumerate(self.encoded)
        ]

    def _completed(self, when: str, i: int) -> str | None:
        return self.completions[when][i] if when in self.completions else None


def open_samples(
    model: Any, rows: Any, format: str, tokenizer: Any, spec: EvaluationSpec, longest: int
) -> Samples | None:
    """Return the samples of a run, or None where there is nothing to complete."""
    if rows is None or not spec.samples or not predicts_tokens(model):
        return None
    found = Samples(rows, format, tokenizer, spec, longest)
    return found if found.encoded else None


def lines(samples: list[dict[str, Any]], width: int = 60) -> list[str]:
    """Say in a line each what became of the prompts."""
    return [
        f"  {_short(s['prompt'], width)!r} gives {_short(s['after'], width)!r}"
        f" (was {_short(s['before'], width)!r})"
        for s in samples
    ]


def _prompt(row: dict[str, Any], format: str, tokenizer: Any, longest: int) -> Encoded:
    """Return the prompt of a row, and what is right after it, if the row says so."""
    if format == "preference":
        return encode_reply(row, "chosen", tokenizer, longest)
    if format == "prompt":
        answer = row.get("answer", "")
        found = encode_reply({"prompt": row["prompt"], "chosen": ""}, "chosen", tokenizer, longest)
        return Encoded(found.prompt, found.completion, answer if isinstance(answer, str) else "")
    found = encode(row, format, tokenizer, longest)
    if found.prompt:
        return found
    rest = tokenizer.decode(found.completion[BEGUN:], skip_special_tokens=True)
    return Encoded(found.completion[:BEGUN], found.completion[BEGUN:], rest)


def _short(text: str | None, width: int) -> str:
    found = " ".join((text or "").split())
    return found if len(found) <= width else f"{found[: width - 3]}..."
