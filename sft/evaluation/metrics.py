"""What a language model is judged by on held-out examples, whichever of it a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sft.data.encode import Encoded
from sft.errors import UserError
from sft.evaluation import completions, likelihood


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Encoded],
    metrics: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, float]:
    """Measure a model on held-out examples; deterministic, and leaves the model's mode as it was.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; supplies the padding and end-of-text ids.
        examples: Held-out examples.
        metrics: Names of `likelihood.NAMES` and `completions.NAMES`.
        max_new_tokens: Longest completion generated.
        batch_size: Examples at a time.

    Raises:
        UserError: Completions are asked for, and an example has no prompt.
    """
    found = {}
    with evaluating(model):
        if set(likelihood.NAMES) & set(metrics):
            pad = tokenizer.pad_token_id
            found["nll"] = likelihood.completion_nll(model, examples, batch_size, pad)
            found["perplexity"] = likelihood.perplexity(found["nll"])
        if set(completions.NAMES) & set(metrics):
            _check_prompts(examples, metrics)
            texts = completions.greedy(model, tokenizer, examples, max_new_tokens, batch_size)
            references = [example.reference for example in examples]
            found["token_error_rate"] = completions.token_error_rate(texts, references)
            found["exact_match"] = completions.exact_match(texts, references)
    return {name: found[name] for name in metrics}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run the block in eval mode; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_prompts(examples: Sequence[Encoded], metrics: Sequence[str]) -> None:
    """Refuse to complete nothing: plain text has no prompts."""
    if not all(example.prompt for example in examples):
        name = next(name for name in metrics if name in completions.NAMES)
        allowed = ", ".join(likelihood.NAMES)
        raise UserError(
            f"evaluation.metrics: got {name} of examples without a prompt, allowed is {allowed}; "
            "give examples with prompt and completion, or leave it out"
        )
