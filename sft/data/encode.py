"""Held-out examples as token ids, split into prompt and completion as TRL's SFTTrainer does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Encoded:
    """One example: the ids a model is given, the ids it should continue with, their text."""

    prompt: list[int]
    completion: list[int]
    reference: str


def encode(example: dict[str, Any], format: str, tokenizer: Any, max_length: int) -> Encoded:
    """Encode one example; the completion ends with the end-of-text token.

    Args:
        example: One row of a data set.
        format: "prompt_completion", "messages" (the last message is the completion), or "text"
            (all of it is; the prompt is empty).
        tokenizer: The model's tokenizer.
        max_length: Tokens kept of prompt and completion together.
    """
    if format == "messages":
        return _encode_messages(example["messages"], tokenizer, max_length)
    prompt = example["prompt"] if format == "prompt_completion" else ""
    reference = example["completion"] if format == "prompt_completion" else example["text"]
    end = "" if reference.endswith(tokenizer.eos_token) else tokenizer.eos_token
    whole = tokenizer(prompt + reference + end)["input_ids"][:max_length]
    start = _common_prefix(tokenizer(prompt)["input_ids"] if prompt else [], whole)
    return Encoded(whole[:start], whole[start:], reference)


def _encode_messages(messages: list[Any], tokenizer: Any, max_length: int) -> Encoded:
    """Encode a conversation with the tokenizer's chat template."""
    template = tokenizer.apply_chat_template
    text = template(messages, tokenize=False)
    before = template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"][:max_length]
    prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
    start = _common_prefix(prompt, whole)
    return Encoded(whole[:start], whole[start:], messages[-1]["content"])


def _common_prefix(left: list[int], right: list[int]) -> int:
    """Count the leading ids that two sequences share."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
