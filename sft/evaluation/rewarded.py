"""What a model's own completions are worth: `reward`, and how right they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft.data.encode import Encoded, encode
from sft.evaluation import completions
from sft.evaluation.metrics import evaluating
from sft.evaluation.spec import EvaluationSpec
from sft.rewards.find import Reward, reference_of

NAMES = ("reward", *completions.NAMES)


def measure(
    model: Any,
    tokenizer: Any,
    rows: Any,
    spec: EvaluationSpec,
    longest: int,
    rewards: Sequence[tuple[Reward, float]],
    reference: str | None,
) -> dict[str, float]:
    """Return the metrics that `spec` names, of `NAMES`, for greedy completions.

    Args:
        model: a causal language model.
        tokenizer: its own.
        rows: with `prompt`, a text or messages, and the columns that rewards read.
        spec: the `evaluation:` section.
        longest: tokens kept of a prompt.
        rewards: functions and weights; `reward` is the weighted sum, a mean over completions.
        reference: column with the right answer, if it is named.
    """
    encoded = encode_prompts(rows, tokenizer, longest)
    with evaluating(model):
        texts = completions.greedy(model, tokenizer, encoded, spec.max_new_tokens, spec.batch_size)
    columns = {name: list(rows[name]) for name in rows.column_names}
    found = {}
    if "reward" in (spec.metrics or ()):
        found["reward"] = total_reward(texts, columns, rewards)
    if set(completions.NAMES) & set(spec.metrics or ()):
        right = reference_of(columns, reference)
        found["token_error_rate"] = completions.token_error_rate(texts, right)
        found["exact_match"] = completions.exact_match(texts, right)
    return {name: found[name] for name in spec.metrics or ()}


def total_reward(
    texts: Sequence[str], columns: dict[str, Any], rewards: Sequence[tuple[Reward, float]]
) -> float:
    """Return the mean over completions of the weighted sum of their rewards; None counts 0."""
    prompts = columns["prompt"]
    chats = bool(prompts) and not isinstance(prompts[0], str)
    written: list[Any] = list(texts)
    if chats:  # as TRL hands them over
        written = [[{"role": "assistant", "content": text}] for text in texts]
    others = {name: values for name, values in columns.items() if name != "prompt"}
    total = 0.0
    for function, weight in rewards:
        values = function(prompts=prompts, completions=written, **others)
        total += weight * sum(value or 0.0 for value in values)
    return total / max(len(texts), 1)


def encode_prompts(rows: Any, tokenizer: Any, longest: int) -> list[Encoded]:
    """Encode prompts alone, texts or conversations, as a model is asked to complete them."""
    return [_encode(row["prompt"], tokenizer, longest) for row in rows]


def _encode(prompt: Any, tokenizer: Any, longest: int) -> Encoded:
    if isinstance(prompt, str):
        found = encode(
            {"prompt": prompt, "completion": ""}, "prompt_completion", tokenizer, longest
        )
        return Encoded(found.prompt, [], "")
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][-longest:]
    return Encoded(ids, [], "")
