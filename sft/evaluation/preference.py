"""How well rewards tell the better of two replies: `reward_accuracy` and `reward_margin`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sft.data.encode import Encoded, encode
from sft.evaluation.batches import by_length, right_padded
from sft.evaluation.likelihood import completion_log_probs
from sft.evaluation.metrics import evaluating
from sft.evaluation.spec import EvaluationSpec

NAMES = ("reward_accuracy", "reward_margin")

Pair = tuple[list[float], list[float]]  # of chosen and of rejected replies


def measure_rewards(
    model: Any, tokenizer: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
) -> dict[str, float]:
    """Return the metrics that `spec` names, of a reward model's scores.

    Args:
        model: a sequence classifier with one output.
        tokenizer: its own.
        rows: with `prompt`, `chosen` and `rejected`, texts or messages; the prompt may be left out.
        format: "preference".
        spec: the `evaluation:` section.
        longest: tokens kept of prompt and reply.
    """

    def scores(examples: list[Encoded]) -> list[float]:
        return _scores(model, examples, spec.batch_size, tokenizer.pad_token_id)

    with evaluating(model):
        pair = _of_both(scores, rows, tokenizer, longest)
    return reward_metrics(*pair, spec.metrics or ())


def measure_policy(
    model: Any,
    tokenizer: Any,
    rows: Any,
    format: str,
    spec: EvaluationSpec,
    longest: int,
    *,
    beta: float = 0.1,
    reference: Pair | None = None,
) -> dict[str, float]:
    """Return the metrics that `spec` names, of a policy's implicit rewards (arXiv:2305.18290).

    beta (log p(reply | prompt) - log p_reference(reply | prompt)). The reference is the model with
    its adapter off, unless its log-probabilities are given.

    Args:
        model: a causal language model.
        tokenizer: its own.
        rows: as for `measure_rewards`.
        format: "preference".
        spec: the `evaluation:` section.
        longest: tokens kept of prompt and reply.
        beta: of the loss.
        reference: `reply_log_probs` of the reference, where the model has no adapter.
    """
    pair = reply_log_probs(model, tokenizer, rows, spec, longest)
    if reference is None:
        off: AbstractContextManager[Any] = (
            model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
        )
        with off:
            reference = reply_log_probs(model, tokenizer, rows, spec, longest)
    chosen, rejected = (
        [beta * (own - of) for own, of in zip(found, base, strict=True)]
        for found, base in zip(pair, reference, strict=True)
    )
    return reward_metrics(chosen, rejected, spec.metrics or ())


def reply_log_probs(
    model: Any, tokenizer: Any, rows: Any, spec: EvaluationSpec, longest: int
) -> Pair:
    """Return log p(reply | prompt) of the chosen and of the rejected replies."""

    def scores(examples: list[Encoded]) -> list[float]:
        found = completion_log_probs(model, examples, spec.batch_size, tokenizer.pad_token_id)
        return [total for total, _ in found]

    with evaluating(model):
        return _of_both(scores, rows, tokenizer, longest)


def reward_metrics(
    chosen: Sequence[float], rejected: Sequence[float], names: Sequence[str]
) -> dict[str, float]:
    """Return the named metrics of rewards.

    reward_accuracy is the share of pairs whose chosen reply has the higher reward, of equal ones
    half; reward_margin is the mean difference.
    """
    gaps = [c - r for c, r in zip(chosen, rejected, strict=True)]
    count = max(len(gaps), 1)
    found = {
        "reward_accuracy": sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / count,
        "reward_margin": sum(gaps) / count,
    }
    return {name: found[name] for name in names}


def encode_reply(row: dict[str, Any], key: str, tokenizer: Any, longest: int) -> Encoded:
    """Encode the prompt of a row and one of its replies, each a text or a list of messages."""
    prompt, reply = row.get("prompt"), row[key]
    if isinstance(reply, str) and isinstance(prompt, list):
        reply = [{"role": "assistant", "content": reply}]
    if isinstance(reply, str):
        pair = {"prompt": prompt or "", "completion": reply}
        return encode(pair, "prompt_completion", tokenizer, longest)
    return encode({"messages": [*(prompt or []), *reply]}, "messages", tokenizer, longest)


def _of_both(
    scores: Callable[[list[Encoded]], list[float]], rows: Any, tokenizer: Any, longest: int
) -> Pair:
    chosen = scores([encode_reply(row, "chosen", tokenizer, longest) for row in rows])
    return chosen, scores([encode_reply(row, "rejected", tokenizer, longest) for row in rows])


@torch.no_grad()
def _scores(model: Any, examples: list[Encoded], size: int, pad: int) -> list[float]:
    """Return a reward model's output for each example."""
    found = [0.0] * len(examples)
    for batch in by_length(examples, size):
        inputs, _ = right_padded([examples[i] for i in batch], pad, model.device)
        for i, score in zip(batch, model(**inputs).logits[:, 0].tolist(), strict=True):
            found[i] = score
    return found
