"""`task: pretrain`: a causal language model learns text from random weights on."""

from __future__ import annotations

from typing import Any, ClassVar

from sft.data.load import Examples
from sft.models import load_config
from sft.recipe.schema import ModelSpec
from sft.tasks.supervised import Supervised


class Pretrain(Supervised):
    """Pre-training of an architecture whose weights start at random.

    With method full its own dense weights are trained, with sltrain in form pretrain the parts of
    W = c B A + S.
    """

    name: ClassVar[str] = "pretrain"
    summary: ClassVar[str] = "a causal language model learns text from random weights on"
    formats: ClassVar[tuple[str, ...]] = ("text", "tokenised")
    metrics: ClassVar[tuple[str, ...]] = ("nll", "perplexity")
    measured: ClassVar[tuple[str, ...]] = ("nll", "perplexity")
    from_random: ClassVar[bool] = True

    def load_model(self, spec: ModelSpec, examples: Examples, device: str | None) -> Any:
        """Build the model; the seed of the recipe is set by now."""
        import torch
        from transformers import AutoModelForCausalLM

        config = load_config(spec)
        dtype = config.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype or torch.float32, trust_remote_code=spec.trust_remote_code
        ).eval()
