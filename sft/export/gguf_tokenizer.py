"""A tokenizer of byte-level BPE as GGUF holds it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from sft.errors import UserError

# llama.cpp's names for the ways in which text is cut before merges, by what tells them apart.
_DIGITS, _BYTES = "Digits", "ByteLevel"
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
_ELSEWHERE = "export --to merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py"


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer.

    Args:
        pre: llama.cpp's name for how text is cut before merges.
        tokens: by id.
        types: of each token; gguf.TokenType.
        merges: "left right", the first ones first.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """Return the vocabulary of a fast tokenizer.

    Args:
        tokenizer: of transformers.
        size: rows of the model's embedding; ids without a token are filled up.

    Raises:
        UserError: it is no byte-level BPE, or cuts text in a way that has no name.
    """
    from gguf import TokenType

    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"--to gguf: the tokenizer has no tokenizer.json; {_ELSEWHERE}")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "sentencepiece-like BPE" if model["type"] == "BPE" else model["type"]
        raise UserError(
            f"--to gguf: the tokenizer is a {kind}, written is byte-level BPE; {_ELSEWHERE}"
        )
    tokens, types = _filled(size, TokenType.UNUSED)
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
    for added in content["added_tokens"] or []:
        special = added["special"]
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocabulary(pre_of(content["pre_tokenizer"]), tokens, types, merges)


def pre_of(cutter: dict[str, Any] | None) -> str:
    """Return llama.cpp's name for a pre-tokenizer of tokenizer.json.

    Raises:
        UserError: it has none that is known here.
    """
    parts = (cutter or {}).get("pretokenizers") or [cutter or {"type": None}]
    kinds = [part["type"] for part in parts]
    if kinds == [_BYTES] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == [_DIGITS, _BYTES] and parts[0].get("individual_digits"):
        return "smollm"
    pattern = parts[0].get("pattern", {}).get("Regex") if kinds == ["Split", _BYTES] else None
    if pattern in _PATTERNS:
        return _PATTERNS[pattern]
    raise UserError(
        f"--to gguf: the tokenizer cuts text by {' and '.join(map(str, kinds))} in a way that is "
        f"not known here; {_ELSEWHERE}"
    )


def _filled(size: int, unused: Any) -> tuple[list[str], list[int]]:
    return [f"[PAD{index}]" for index in range(size)], [int(unused)] * size
