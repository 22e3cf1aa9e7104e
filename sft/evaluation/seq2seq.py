"""What a model of encoder and decoder is judged by: likelihood, and its own completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sft.evaluation import completions, likelihood
from sft.evaluation.batches import IGNORED
from sft.evaluation.metrics import evaluating
from sft.evaluation.spec import EvaluationSpec

NAMES = (*likelihood.NAMES, *completions.NAMES)

Row = dict[str, Any]


def encode(row: Row, tokenizer: Any, source: int, target: int) -> Row:
    """Encode a prompt, and its completion as labels.

    Args:
        row: with `prompt` and `completion`.
        tokenizer: of the model; ends both texts as it does by itself.
        source: tokens kept of the prompt.
        target: tokens kept of the completion.
    """
    found = tokenizer(row["prompt"], truncation=True, max_length=source)
    labels = tokenizer(text_target=row["completion"], truncation=True, max_length=target)
    ids, end = list(labels["input_ids"]), tokenizer.eos_token_id
    if end is not None and end not in ids:  # a decoder must learn where to stop
        ids = [*ids[: target - 1], end]
    return {
        "input_ids": found["input_ids"],
        "attention_mask": found["attention_mask"],
        "labels": ids,
    }


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Stack encoded rows, padded on the right."""
    fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
    stack = torch.nn.utils.rnn.pad_sequence
    return {
        key: stack([torch.tensor(r[key]) for r in rows], batch_first=True, padding_value=value)
        for key, value in fill.items()
    }


def measure(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Row],
    references: Sequence[str],
    spec: EvaluationSpec,
) -> dict[str, float]:
    """Return the metrics that `spec` names, of `NAMES`.

    Args:
        model: of encoder and decoder.
        tokenizer: its own.
        encoded: rows by `encode`.
        references: their completions as text.
        spec: the `evaluation:` section.
    """
    asked, size = set(spec.metrics or ()), spec.batch_size
    starts = range(0, len(encoded), size)
    batches = [collate(encoded[s : s + size], tokenizer.pad_token_id) for s in starts]
    found = {}
    with evaluating(model):
        if asked & set(likelihood.NAMES):
            found["nll"] = nll(model, batches)
            found["perplexity"] = likelihood.perplexity(found["nll"])
        if asked & set(completions.NAMES):
            texts = greedy(model, tokenizer, batches, spec.max_new_tokens)
            found["token_error_rate"] = completions.token_error_rate(texts, references)
            found["exact_match"] = completions.exact_match(texts, references)
    return {name: found[name] for name in spec.metrics or ()}


@torch.no_grad()
def nll(model: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    """Return the mean negative log-likelihood of a token of the completions, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        placed = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(**placed).logits.float()
        labels = placed["labels"]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"
        )
        total, count = total + float(losses), count + int((labels != IGNORED).sum())
    return total / max(count, 1)


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, batches: Sequence[dict[str, Tensor]], max_new_tokens: int
) -> list[str]:
    """Complete each prompt greedily."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=completions.end_tokens(model, tokenizer),
        decoder_start_token_id=model.config.decoder_start_token_id,
    )
    texts: list[str] = []
    for batch in batches:
        given = {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask")}
        out = model.generate(**given, generation_config=settings)
        texts += tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)
    return texts
