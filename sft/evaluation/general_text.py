"""The text that forgetting is measured on: a shipped one, or any data."""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import Tensor

from sft.errors import UserError
from sft.evaluation.spec import ForgettingSpec


def windows(spec: ForgettingSpec, tokenizer: Any, model: Any) -> list[Tensor]:
    """Return the ids of the text, cut to what is read at once.

    Every window begins as the tokenizer begins a text. The last may be shorter.

    Args:
        spec: the `forgetting:` section.
        tokenizer: of the model.
        model: read for the positions that it has.

    Raises:
        UserError: the text cannot be read, or is shorter than two tokens.
    """
    begin = _beginning(tokenizer)
    length = min(spec.window, _positions(model))
    step = max(length - len(begin), 1)
    ids = _ids(spec, tokenizer)[: spec.max_tokens]
    cut = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    found = [torch.tensor(window) for window in cut if len(window) > 1]
    if not found:
        raise UserError(
            f"forgetting.data: {spec.data}: got {len(ids)} tokens, allowed is 2 or more; "
            "give a longer text"
        )
    return found


def general_text() -> str:
    """Return the shipped text: public-domain accounts of countries, in no order."""
    return (resources.files("sft") / "builtin" / "general.txt").read_text(encoding="utf-8")


def _ids(spec: ForgettingSpec, tokenizer: Any) -> list[int]:
    """Return the ids of the text, its examples one after another; as many as are read, or more."""
    if spec.data == "general":
        return _plain(general_text(), tokenizer)
    from sft.data.encode import encode
    from sft.data.load import load_data
    from sft.data.spec import DataSpec

    formats = ("text", "prompt_completion", "messages")
    found = load_data(DataSpec(train=spec.data), 0, formats, key="forgetting.data")
    begin, ids = _beginning(tokenizer), list[int]()
    for row in found.train:
        if found.format == "text":
            ids += _plain(f"{row['text']}\n", tokenizer)
        else:
            encoded = encode(row, found.format, tokenizer, 10**9)
            whole = encoded.prompt + encoded.completion
            ids += whole[len(begin) :] if whole[: len(begin)] == begin else whole
        if len(ids) >= spec.max_tokens:
            break
    return ids


def _plain(text: str, tokenizer: Any) -> list[int]:
    # its length is more than models read at once, of which a tokenizer would warn
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _beginning(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before every text: one token, or none."""
    first = tokenizer("")["input_ids"][:1]
    return [id for id in first if id == tokenizer.bos_token_id]


def _positions(model: Any) -> int:
    """Return how many tokens a model reads at most."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 10**9
