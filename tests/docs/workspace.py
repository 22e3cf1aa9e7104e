"""A folder in which the commands of the pages work: tiny models under the names the pages use."""

from __future__ import annotations

import json
from pathlib import Path

import torch

HUB_MODELS = ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")
EMBEDDED = "smollm2-135m-instruct"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_models(hub: Path, cache: Path) -> None:
    """Write tiny models: into a hub cache, and where the embedded one is kept."""
    import importlib.metadata

    from sft.embedded import MODELS, find_gguf

    for name in HUB_MODELS:
        folder = hub / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        write_model(folder / "snapshots" / ("0" * 40))
    major = importlib.metadata.version("transformers").partition(".")[0]
    digest = find_gguf(MODELS[EMBEDDED])[1]
    write_model(cache / f"{EMBEDDED}-{digest[:16]}-transformers{major}")


def write_model(folder: Path) -> None:
    """Write a Llama of two layers, with a tokenizer of bytes and pairs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer():
    """Return a byte-level tokenizer that knows the marks of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters, "th"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<|im_start|>",
        eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE,
    )  # fmt: skip


def make_files(folder: Path) -> None:
    """Write the data and the recipe that pages call their reader's own."""
    pairs = [(f"{a} + {b} =", f" {a + b}") for a in range(5) for b in range(5)]
    rows = {
        "rows.jsonl": [{"prompt": p, "completion": c} for p, c in pairs],
        "chats.jsonl": [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]}
            for p, c in pairs
        ],
        "preferences.jsonl": [{"prompt": p, "chosen": c, "rejected": " no"} for p, c in pairs],
        "labelled.jsonl": [{"text": p, "label": i % 2} for i, (p, _) in enumerate(pairs)],
        "text.jsonl": [{"text": p + c} for p, c in pairs],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    recipe = (
        f"model: {{name: {EMBEDDED}, dtype: float32}}\n"
        "method: {name: spiel, density: 0.01}\n"
        "data: {train: rows.jsonl, eval_examples: 4}\n"
        "training: {output_dir: runs/my, max_steps: 2, save_strategy: 'no'}\n"
    )
    for name in ("my.yaml", "base.yaml"):
        (folder / name).write_text(recipe, encoding="utf-8")
