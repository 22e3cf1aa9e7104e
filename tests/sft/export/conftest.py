"""A base with a byte-level tokenizer, and adapters on disk whose deltas are random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VOCABULARY = 272


@pytest.fixture(scope="session")
def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=266,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer.add_tokens(["<mark>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<end>",
        unk_token="<end>", chat_template="{{ messages[0]['content'] }}",
    )  # fmt: skip


@pytest.fixture
def byte_base(llama, byte_tokenizer, tmp_path) -> Path:
    """Write a tied Llama with a tokenizer that has merges."""
    folder = tmp_path / "base"
    model = llama(vocab_size=VOCABULARY, tie_word_embeddings=True, num_key_value_heads=1)
    model.generation_config.max_length = 33
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def refused() -> Callable[..., str]:
    """Run a command that must fail by the user's mistake; return the one line that says why."""

    def run(*words: Any) -> str:
        from typer.testing import CliRunner

        from sft.cli import app

        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        return line

    return run


@pytest.fixture
def adapter_on(tmp_path) -> Callable[..., Path]:
    """Train nothing, but give every trained value a number, and save the adapter."""

    def save(base: Path, config: Any, kind: Any = None, name: str = "adapter") -> Path:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        model = get_peft_model((kind or AutoModelForCausalLM).from_pretrained(base), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save
