"""What training unlearns: loss on general text before and after, and divergence from the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sft.evaluation.general_text import windows
from sft.evaluation.likelihood import perplexity
from sft.evaluation.log_probs import log_probs
from sft.evaluation.metrics import evaluating
from sft.evaluation.reduced import KEPT, Reduced, divergence, reduce
from sft.evaluation.spec import ForgettingSpec


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a model says of a text."""

    loss: float  # nats a token
    kl: float | None  # KL(base || model), nats a token


class Forgetting:
    """Reads the same text with the base and with what becomes of it.

    Of the base, the likeliest tokens of each position stay in memory: 8 KiB a token. So neither a
    second model nor a way back to the first one is needed, whatever is trained.

    Args:
        spec: the `forgetting:` section.
        tokenizer: of the model.
        model: a causal language model; its configuration bounds the length of what is read at once.
    """

    def __init__(self, spec: ForgettingSpec, tokenizer: Any, model: Any) -> None:
        self.spec = spec
        self.windows = windows(spec, tokenizer, model)
        self.tokens = sum(len(window) - 1 for window in self.windows)
        self.base: list[list[Reduced]] = []
        self.before: Judged | None = None

    def read_base(self, model: Any) -> Judged:
        """Read the text with the base, and keep what it says."""
        self.base = []
        self.before = judge(model, self.windows, keep=self.base)
        return self.before

    def read(self, model: Any) -> dict[str, float]:
        """Read it with what has become of the base; return `forgetting_loss` and `..._kl`."""
        found = judge(model, self.windows, base=self.base)
        assert found.kl is not None
        return {"forgetting_loss": found.loss, "forgetting_kl": found.kl}

    def forgets(self, loss: float) -> bool:
        """Tell whether a loss has risen by more than the threshold."""
        assert self.before is not None
        return not loss - self.before.loss <= self.spec.threshold  # NaN is an alert

    def report(self, model: Any) -> dict[str, Any]:
        """Read the text with the trained model; return run.json's section `forgetting`."""
        assert self.before is not None
        found, loss = self.read(model), self.before.loss
        after = found["forgetting_loss"]
        return {
            "text": self.spec.data,
            "tokens": self.tokens,
            "loss_before": loss,
            "loss_after": after,
            "perplexity_before": perplexity(loss),
            "perplexity_after": perplexity(after),
            "kl": found["forgetting_kl"],
            "threshold": self.spec.threshold,
            "alert": self.forgets(after),
        }


def judge(
    model: Any,
    windows: Sequence[Tensor],
    *,
    base: Sequence[Sequence[Reduced]] | None = None,
    keep: list[list[Reduced]] | None = None,
    kept: int = KEPT,
) -> Judged:
    """Read windows of a text with a model.

    Args:
        model: a causal language model, in any mode.
        windows: token ids; the first of each is given, the others are predicted.
        base: what the base said, chunk by chunk, to compare with.
        keep: filled with what this model says.
        kept: how many tokens of a distribution are kept.
    """
    loss, kl = 0.0, 0.0
    with evaluating(model):
        for i, window in enumerate(windows):
            said: list[Reduced] = []
            for j, (chunk, targets) in enumerate(_read(model, window)):
                loss -= float(chunk.gather(1, targets[:, None]).double().sum())
                if base is not None:
                    kl += float(divergence(base[i][j], chunk).sum())
                if keep is not None:
                    said.append(reduce(chunk, kept))
            if keep is not None:
                keep.append(said)
    tokens = sum(len(window) - 1 for window in windows)
    return Judged(loss / tokens, None if base is None else kl / tokens)


def describe(section: dict[str, Any]) -> str:
    """Say in one line what a section of run.json found."""
    return (
        f"{section['text']} text: loss {section['loss_after']:.4f} (was "
        f"{section['loss_before']:.4f}), perplexity {section['perplexity_after']:.2f} (was "
        f"{section['perplexity_before']:.2f}), KL from the base {section['kl']:.4f}, on "
        f"{section['tokens']:,} tokens"
    )


def alert(section: dict[str, Any] | None) -> str | None:
    """Return the warning that a section of run.json asks for, if any."""
    if section is None or not section["alert"]:
        return None
    rise = section["loss_after"] - section["loss_before"]
    return (
        f"forgetting: loss on {section['text']} text rose by {rise:.3f} nats, more than the "
        f"threshold {section['threshold']:g}; train less, lower the learning rate or the density, "
        "or mix general text into data.train"
    )


def _read(model: Any, window: Tensor) -> Any:
    """Yield the log-probabilities of a window's tokens with the tokens, chunk by chunk."""
    ids = window[None].to(model.device)
    wanted = torch.ones_like(ids, dtype=torch.bool)
    wanted[:, -1] = False
    start = 1
    for chunk in log_probs(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, wanted
    ):
        yield chunk, window[start : start + len(chunk)].to(chunk.device)
        start += len(chunk)
