"""A tiny model of every kind on disk, rows for every task, and the runs that join them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "->"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = [f"{a} {b} ->" for a in WORDS[:4] for b in WORDS[:4]]
ANSWERS = [f" {WORDS[(i + 1) % 8]}" for i in range(len(TEXTS))]


@pytest.fixture(scope="session")
def word_tokenizer():
    """One token a word, and those that encoders need."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", "<mask>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "<end>", "<unk>", "<mask>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        mask_token="<mask>",
    )  # fmt: skip


def tiny(kind: str, vocabulary: int) -> Any:
    """Return a pretrained model as it would be found: without the head of a task."""
    import transformers as t

    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if kind == "llama":
        sizes = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
        config = t.LlamaConfig(**sizes, **ids, max_position_embeddings=64)
        return t.LlamaForCausalLM(config)
    if kind == "bert":
        sizes = SMALL | {"intermediate_size": 48, "max_position_embeddings": 64}
        return t.BertForMaskedLM(t.BertConfig(vocab_size=vocabulary, pad_token_id=0, **sizes))
    if kind == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}
        return t.DistilBertForMaskedLM(
            t.DistilBertConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes)
        )
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
        more = {"vocab_size": vocabulary, "decoder_start_token_id": 0, "pad_token_id": 0}
        return t.T5ForConditionalGeneration(t.T5Config(**sizes, **more, eos_token_id=1))
    if kind == "bart":
        sizes = {f"{half}_{k}": n for half in ("encoder", "decoder")
                 for k, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
        more = {"vocab_size": vocabulary, "d_model": 32, "max_position_embeddings": 64}
        special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
        start = {"decoder_start_token_id": 1, "forced_eos_token_id": None}
        return t.BartForConditionalGeneration(t.BartConfig(**sizes, **more, **special, **start))
    config = t.ViTConfig(**SMALL, intermediate_size=48, image_size=16, patch_size=8)
    return t.ViTForImageClassification(config)


@pytest.fixture(scope="session")
def models(tmp_path_factory, word_tokenizer):
    """Return the folder of a tiny pretrained model by its kind."""
    import torch
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            tiny(kind, len(word_tokenizer)).save_pretrained(made[kind])
            if kind == "vit":
                ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(made[kind])
            else:
                word_tokenizer.save_pretrained(made[kind])
        return made[kind]

    return folder


def rows_of(task: str) -> dict[str, list[Any]]:
    """Return columns that a task trains on."""
    prompts = {"prompt": TEXTS, "completion": ANSWERS}
    if task in ("dpo", "reward"):
        wrong = [*ANSWERS[1:], ANSWERS[0]]
        return {"prompt": TEXTS, "chosen": ANSWERS, "rejected": wrong}
    if task in ("masked-lm", "pretrain"):
        return {"text": [f"{t}{a}" for t, a in zip(TEXTS, ANSWERS, strict=True)] * 4}
    if task == "classification":
        labels = ["low", "mid", "high", "mid"] * 4
        return {"text": TEXTS, "label": labels}
    if task == "token-classification":
        tags = [["O", "B-N", "I-N"]] * len(TEXTS)
        return {"tokens": [text.split() for text in TEXTS], "tags": tags}
    if task == "image-classification":
        from PIL import Image

        colours = [(255, 0, 0), (0, 0, 255)] * 8
        images = [Image.new("RGB", (20, 16), colour) for colour in colours]
        return {"image": images, "label": ["red", "blue"] * 8}
    return {"prompt": TEXTS, "answer": ANSWERS} if task == "grpo" else prompts


@pytest.fixture
def rows_file(tmp_path):
    """Write the rows of a task, or others, as a user would; return the path."""

    def write(task: str, columns: dict[str, list[Any]] | None = None) -> Path:
        columns = columns or rows_of(task)
        if "image" in columns:
            folder = tmp_path / "images"
            for i, (image, label) in enumerate(zip(*columns.values(), strict=True)):
                (folder / label).mkdir(parents=True, exist_ok=True)
                image.save(folder / label / f"{i}.png")
            return folder
        path = tmp_path / "rows.jsonl"
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
