"""What a run is judged by: error rates of greedy completions, and likelihood of the right ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sft.data.encode import Encoded


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
        metrics: Names among "nll", "token_error_rate", "exact_match".
        max_new_tokens: Longest completion generated.
        batch_size: Examples at a time.
    """
    training = model.training
    model.eval()
    try:
        found = {}
        if "nll" in metrics:
            found["nll"] = completion_nll(model, examples, batch_size, tokenizer.pad_token_id)
        if {"token_error_rate", "exact_match"} & set(metrics):
            texts = greedy(model, tokenizer, examples, max_new_tokens, batch_size)
            references = [example.reference for example in examples]
            found["token_error_rate"] = token_error_rate(texts, references)
            found["exact_match"] = exact_match(texts, references)
        return {name: found[name] for name in metrics}
    finally:
        model.train(training)


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Count the insertions, deletions and substitutions that turn one sequence into another."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def token_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Return edits over reference length, in white-space tokens, summed over all examples.

    Of phonemes it is the phoneme error rate, of words the word error rate. It exceeds 1 when the
    hypotheses are longer than the references.
    """
    pairs = [(h.split(), r.split()) for h, r in zip(hypotheses, references, strict=True)]
    length = sum(len(reference) for _, reference in pairs)
    return sum(edit_distance(h, r) for h, r in pairs) / max(length, 1)


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of hypotheses equal to their references, up to white space."""
    pairs = list(zip(hypotheses, references, strict=True))
    return sum(h.split() == r.split() for h, r in pairs) / max(len(pairs), 1)


@torch.no_grad()
def completion_nll(model: Any, examples: Sequence[Encoded], batch_size: int, pad: int) -> float:
    """Return the mean negative log-likelihood of a completion token, in nats."""
    total, count = 0.0, 0
    for batch in _by_length(examples, batch_size):
        inputs, labels = _right_padded([examples[i] for i in batch], pad, model.device)
        # from the end: a trained prompt stands before the inputs
        logits = model(**inputs).logits[:, -labels.shape[1] : -1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="sum"
        )
        total += losses.item()
        count += int((labels[:, 1:] != -100).sum())
    return total / max(count, 1)


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, examples: Sequence[Encoded], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Complete each prompt greedily; batches are of like length and padded on the left."""
    from transformers import GenerationConfig

    # A fresh configuration: the model's own may hold sampling settings that greedy search rejects.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = [""] * len(examples)
    for batch in _by_length(examples, batch_size):
        ids, mask = _left_padded([examples[i].prompt for i in batch], tokenizer.pad_token_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        new = out[:, ids.shape[1] :]
        for i, text in zip(
            batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            texts[i] = text
    return texts


def held_out_batches(
    examples: Sequence[Encoded], batch_size: int, pad: int, device: Any, count: int
) -> list[dict[str, torch.Tensor]]:
    """Return the inputs of the first few batches, for comparing two models' logits."""
    batches = list(_by_length(examples, batch_size))[:count]
    return [_right_padded([examples[i] for i in batch], pad, device)[0] for batch in batches]


def _by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Yield positions in batches, longest prompts first, ties in order."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _right_padded(
    batch: Sequence[Encoded], pad: int, device: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Stack prompt + completion; labels are -100 on the prompt and on padding."""
    rows = [torch.tensor(example.prompt + example.completion) for example in batch]
    labels = [torch.tensor([-100] * len(example.prompt) + example.completion) for example in batch]
    stack = torch.nn.utils.rnn.pad_sequence
    ids = stack(rows, batch_first=True, padding_value=pad)
    mask = stack([torch.ones_like(row) for row in rows], batch_first=True)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    return inputs, stack(labels, batch_first=True, padding_value=-100).to(device)


def _left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack prompts so that all of them end in the last column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
