"""Load an exported folder as the stock model that it says it is, and make inputs to try it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SENTENCE = "The quick brown fox jumps over the lazy dog."
_IDS = 8  # of an input where no tokenizer tells any
_PREFIX = 4  # ids that a decoder is given


def reload(folder: Path | str, **how: Any) -> Any:
    """Load a model by the architecture that its config.json names, in its own dtype."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = getattr(config, "architectures", None) or [""]
    kind: Any = getattr(transformers, names[0], transformers.AutoModelForCausalLM)
    return kind.from_pretrained(folder, **({"dtype": "auto"} | how))


def probe_for(model: Any, processor: Any = None) -> dict[str, Tensor]:
    """Return an input that suits a model of any kind: a sentence, ids, or noise in place of pixels.

    Args:
        model: its class names its main input.
        processor: tokenizer or image processor, if there is one.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (1, getattr(config, "num_channels", 3), *sides)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = _ids(processor) if hasattr(processor, "convert_tokens_to_ids") else torch.empty(1, 0)
    text = config.get_text_config()
    ids, vocabulary = ids[:, : getattr(text, "max_position_embeddings", None)], text.vocab_size
    if not ids.numel() or int(ids.max()) >= vocabulary:  # the tokenizer of another model
        ids = torch.randint(vocabulary, (1, _IDS), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = found["input_ids"][:, :_PREFIX]
    return found


def _ids(tokenizer: Any) -> Tensor:
    return torch.tensor([tokenizer(SENTENCE)["input_ids"]])


def first_output(output: Any) -> Tensor:
    """Return the logits of a model's output, or what comes first where it has none."""
    found = getattr(output, "logits", None)
    tensor: Tensor = output[0] if found is None else found
    return tensor
