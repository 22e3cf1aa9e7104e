"""Which architectures are written as GGUF, and how their settings and tensors are named there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.errors import UserError

Array = NDArray[Any]
# transformers' model type: GGUF's architecture, and whether its rotary pairs are neighbours
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_BIASES = ("attention_bias", "mlp_bias")  # transformers reads these architectures without
_ELSEWHERE = "export --to merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py"


class Layout:
    """GGUF's view of a model.

    Args:
        config: of the stock model.

    Raises:
        UserError: it is of an architecture, or has a setting, that is not written here.
    """

    def __init__(self, config: Any) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        _check(config)
        self.config = config
        self.architecture, self._neighbours = _ARCHITECTURES[config.model_type]
        kind: Any = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == self.architecture)
        self._names = get_tensor_name_map(kind, config.num_hidden_layers)

    def name(self, name: str) -> str:
        """Return GGUF's name of a tensor.

        Raises:
            UserError: it has none.
        """
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"--to gguf: {name} has no place in {self.architecture}; {_ELSEWHERE}")
        return found

    def lay_out(self, name: str, tensor: Array) -> Array:
        """Return a tensor as GGUF holds it: queries and keys with rotary pairs side by side."""
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        part = name.split(".")[-2] if "." in name else ""
        if not self._neighbours or part not in heads:
            return tensor
        halves = tensor.reshape(heads[part], 2, -1, *tensor.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)

    def describe(self, writer: Any) -> None:
        """Write the settings of the model."""
        config = self.config
        head = head_size(config)
        settings: dict[Callable[[Any], None], Any] = {
            writer.add_context_length: config.max_position_embeddings,
            writer.add_embedding_length: config.hidden_size,
            writer.add_block_count: config.num_hidden_layers,
            writer.add_feed_forward_length: config.intermediate_size,
            writer.add_head_count: config.num_attention_heads,
            writer.add_head_count_kv: config.num_key_value_heads,
            writer.add_layer_norm_rms_eps: config.rms_norm_eps,
            writer.add_rope_freq_base: config.rope_parameters["rope_theta"],
            writer.add_rope_dimension_count: head,
            writer.add_key_length: head,
            writer.add_value_length: head,
            writer.add_vocab_size: config.vocab_size,
        }
        for add, value in settings.items():
            add(value)


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _check(config: Any) -> None:
    kind = config.model_type
    if kind not in _ARCHITECTURES or not config.architectures[0].endswith("ForCausalLM"):
        raise UserError(
            f"--to gguf: got {config.architectures[0]}, written are causal language models of "
            f"type {', '.join(_ARCHITECTURES)}; {_ELSEWHERE}"
        )
    rope = config.rope_parameters.get("rope_type", "default")
    window = getattr(config, "sliding_window", None) if kind == "mistral" else None
    sliding = getattr(config, "use_sliding_window", False)
    for key, value, plain in (
        ("rope_type", rope, "default"),
        ("sliding_window", window, None),
        ("use_sliding_window", bool(sliding), False),
        *((key, getattr(config, key, False), False) for key in _BIASES),
    ):
        if value != plain:
            raise UserError(f"--to gguf: {key}={value!r} is not written here; {_ELSEWHERE}")
