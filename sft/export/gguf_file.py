"""Write a trained model as one GGUF file, tensor by tensor, for llama.cpp and what is built on it.

The file is made by the package gguf. Norms and biases stay float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sft.errors import UserError
from sft.export.gguf_layout import Array, Layout
from sft.export.gguf_tokenizer import vocabulary_of
from sft.export.trained import TrainedWeights

FILE = "model.gguf"
TYPES = ("f32", "f16", "bf16", "q8_0")
_BLOCK = 32  # weights of a row that q8_0 scales together


def write_gguf(
    weights: TrainedWeights, tokenizer: Any, folder: Path, *, kind: str = "q8_0", name: str = ""
) -> Path:
    """Write model and tokenizer.

    Args:
        weights: of a causal language model.
        tokenizer: of transformers.
        folder: exists.
        kind: of the matrices: "f32", "f16", "bf16" or "q8_0" (8 bits, blocks of 32).
        name: that the file gives the model.

    Raises:
        UserError: architecture or tokenizer are not written here, or the package is missing.
    """
    gguf = need_gguf()
    if kind not in TYPES:
        raise UserError(f"--gguf-type: got {kind!r}; expected one of {', '.join(TYPES)}")
    layout = Layout(weights.config)
    writer = gguf.GGUFWriter(folder / FILE, layout.architecture)
    _describe(writer, layout, tokenizer, kind, name)
    names = [name for name in weights.names() if not name.endswith("rotary_emb.inv_freq")]
    for each in names:
        _announce(writer, layout.name(each), weights.slot(each).shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in names:
        array = layout.lay_out(each, weights.read(each).float().numpy())
        writer.write_tensor_data(_encoded(array, stored_as(array.shape, kind)))
    writer.close()
    return folder / FILE


def rounded(tensor: Tensor, kind: str) -> Tensor:
    """Return what a tensor is once it was written: float32."""
    stored = stored_type(stored_as(tuple(tensor.shape), kind))
    gguf = need_gguf()
    array = gguf.quants.quantize(tensor.detach().float().numpy(), stored)
    return torch.from_numpy(np.array(gguf.quants.dequantize(array, stored), np.float32))


def stored_as(shape: tuple[int, ...], kind: str) -> str:
    """Return how a tensor of a shape is stored: vectors in float32, odd rows not in 8 bits."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _BLOCK else kind


def stored_type(kind: str) -> Any:
    """Return gguf's type of a name."""
    return need_gguf().GGMLQuantizationType[kind.upper()]


def need_gguf() -> Any:
    """Return the package gguf.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            '--to gguf: needs the package gguf: pip install "sparse-sft[demo]"'
        ) from None
    return gguf


def _describe(writer: Any, layout: Layout, tokenizer: Any, kind: str, name: str) -> None:
    gguf = need_gguf()
    file_type = {
        "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
    }[kind]  # fmt: skip
    writer.add_type("model")
    writer.add_name(name or layout.architecture)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    layout.describe(writer)
    found = vocabulary_of(tokenizer, layout.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    writer.add_token_merges(found.merges)
    writer.add_add_bos_token(_starts_with_bos(tokenizer))
    for key, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("unk_token_id", writer.add_unk_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if getattr(tokenizer, key) is not None:
            add(getattr(tokenizer, key))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _starts_with_bos(tokenizer: Any) -> bool:
    """Tell whether the tokenizer itself puts the first token before a text."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Enter a tensor in the file's table."""
    stored = stored_as(shape, kind)
    held = need_gguf().quant_shape_to_byte_shape(shape, stored_type(stored))
    packed = stored == "q8_0"  # of which gguf wants to be told the bytes of a row
    given = np.dtype(np.uint8 if packed else np.float32)
    taken = tuple(held) if packed else shape
    writer.add_tensor_info(name, taken, given, int(np.prod(held)), stored_type(stored))


def _encoded(array: Array, stored: str) -> Array:
    found: Array = need_gguf().quants.quantize(array, stored_type(stored))
    return found
