"""How right a model's own completions are: `token_error_rate` and `exact_match`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sft.data.encode import Encoded
from sft.evaluation.batches import by_length, left_padded

NAMES = ("token_error_rate", "exact_match")


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


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Count the insertions, deletions and substitutions that turn one sequence into another."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


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
        eos_token_id=end_tokens(model, tokenizer),
    )
    texts = [""] * len(examples)
    for batch in by_length(examples, batch_size):
        ids, mask = left_padded([examples[i].prompt for i in batch], tokenizer.pad_token_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        new = out[:, ids.shape[1] :]
        for i, text in zip(
            batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            texts[i] = text
    return texts


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: the tokenizer's, and those that the model was shipped with.

    A chat model may end its turns with another token than its texts.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return sorted({id for id in (tokenizer.eos_token_id, *several) if id is not None})
