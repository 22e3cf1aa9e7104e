"""Held-out examples as token ids, split into prompt and completion as TRL's SFTTrainer does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

IGNORED = -100


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
        format: "prompt_completion" (texts, or lists of messages), "messages" (the last message is
            the completion), "text" (all of it is; the prompt is empty), "tokenised" (what has
            labels is), or any other of which the length is asked.
        tokenizer: The model's tokenizer.
        max_length: Tokens kept of prompt and completion together.
    """
    if format == "tokenised":
        return _tokenised(example, tokenizer, max_length)
    messages = _messages(example, format)
    if messages is not None:
        return _encode_messages(messages, example.get("tools"), tokenizer, max_length)
    prompt, reference = _texts(example, format)
    end = "" if reference.endswith(tokenizer.eos_token) else tokenizer.eos_token
    whole = tokenizer(prompt + reference + end)["input_ids"][:max_length]
    start = _common_prefix(tokenizer(prompt)["input_ids"] if prompt else [], whole)
    return Encoded(whole[:start], whole[start:], reference)


def _messages(example: dict[str, Any], format: str) -> list[Any] | None:
    """Return the conversation of an example, or None where it is text."""
    if format == "messages":
        return list(example["messages"])
    key = {"prompt_completion": "completion", "preference": "chosen"}.get(format, "prompt")
    if not isinstance(example.get(key), list):
        return None
    return [*(example.get("prompt") or []), *(example[key] if key != "prompt" else [])]


def _texts(example: dict[str, Any], format: str) -> tuple[str, str]:
    """Return the prompt of an example and what comes after."""
    if format in ("prompt_completion", "preference"):
        key = "completion" if format == "prompt_completion" else "chosen"
        return example.get("prompt") or "", example[key]
    if format in ("text", "classification"):
        return "", " ".join(filter(None, (example["text"], example.get("text_pair"))))
    if format == "multiple_choice":
        return example["question"], " " + max(example["choices"], key=len)
    return "", " ".join(example["tokens"]) if "tokens" in example else example.get("prompt", "")


def _tokenised(example: dict[str, Any], tokenizer: Any, max_length: int) -> Encoded:
    """Take ids as they are; the completion begins with the first label that counts."""
    ids = list(example["input_ids"])[:max_length]
    labels = list(example.get("labels") or ids)[:max_length]
    start = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    text = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return Encoded(ids[:start], ids[start:], text)


def _encode_messages(messages: list[Any], tools: Any, tokenizer: Any, max_length: int) -> Encoded:
    """Encode a conversation with the tokenizer's chat template."""
    tools = json.loads(tools) if isinstance(tools, str) else tools

    def template(part: list[Any], **how: Any) -> str:
        given = {"tools": tools} if tools else {}
        return str(tokenizer.apply_chat_template(part, tokenize=False, **given, **how))

    text = template(messages)
    before = template(messages[:-1], add_generation_prompt=True)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"][:max_length]
    prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
    start = _common_prefix(prompt, whole)
    return Encoded(whole[:start], whole[start:], str(messages[-1]["content"] or ""))


def _common_prefix(left: list[int], right: list[int]) -> int:
    """Count the leading ids that two sequences share."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
