"""Shrink a model's configuration, and keep what makes its family what it is."""

from __future__ import annotations

from typing import Any

LAYERS, HIDDEN, HEADS, HEAD = 2, 32, 4, 8

SIZES: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("projection_dim", "projection_size", "pooler_output_size"), HIDDEN),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), HIDDEN),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 64),
    **dict.fromkeys(("max_target_positions", "num_mel_bins"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), HEAD),
    "v_head_dim": 12,
    "topk_group": 1,
    "rotary_dim": 4,
    "first_k_dense_replace": 1,
    "vocab_size": 96,
    "image_size": 8,
    "patch_size": 4,
}
HEAD_SIZES = ("head_dim", "d_kv")
HEAD_COUNTS = ("num_attention_heads", "n_head", "num_heads")
KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads")
# Said by the checkpoint, not by the family; or worked out anew from the rest.
LEFT_OUT = {
    "_name_or_path",
    "architectures",
    "dtype",
    "moe_layers",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "model_type",
}
HIGHEST_SPECIAL_TOKEN = 3


def small_config(config: Any) -> Any:
    """Return a configuration of the same class for a model of two narrow layers.

    Switches (biases, norms, activations) stay. So do ratios that matter: fewer key-value heads
    than query heads, a head size that isn't hidden_size / heads, fewer chosen experts than there
    are. Composite configurations are shrunk part by part.
    """
    settings = {k: v for k, v in config.to_dict().items() if k not in LEFT_OUT}
    parts = {name for name in getattr(config, "sub_configs", None) or {} if name in settings}
    small = {
        name: small_value(name, value, settings)
        for name, value in settings.items()
        if name not in parts
    }
    for name in parts:
        part = getattr(config, name, None)
        small[name] = None if part is None else small_config(part).to_dict()
    return type(config)(**small)


def small_value(name: str, value: Any, settings: dict[str, Any]) -> Any:
    """Return one setting of the small configuration."""
    if name.endswith("_token_id") and isinstance(value, int):
        return min(value, HIGHEST_SPECIAL_TOKEN)
    if isinstance(value, list):
        return small_list(value, settings)
    if value is None or isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in KEY_VALUE_COUNTS:
        return small_key_values(value, settings)
    if name in HEAD_SIZES and "qk_rope_head_dim" in settings:
        return small_value("qk_rope_head_dim", settings["qk_rope_head_dim"], {})
    if name == "intermediate_size" and "pixel_shuffle_ratio" in settings:
        return int(HIDDEN / settings["pixel_shuffle_ratio"] ** 2)  # of the pixels put together
    if name in HEAD_SIZES:
        heads = first_of(HEAD_COUNTS, settings)
        hidden = first_of(("hidden_size", "d_model", "n_embd"), settings)
        return HEAD if heads and value * heads == hidden else 12
    return min(value, SIZES[name]) if name in SIZES else value


def small_key_values(count: int, settings: dict[str, Any]) -> int:
    """Return 1 for multi-query, 2 for grouped-query, all heads for plain attention."""
    heads = first_of(HEAD_COUNTS, settings) or count
    if count == 1:
        return 1
    return HEADS if count >= heads else HEADS // 2


def small_list(values: list[Any], settings: dict[str, Any]) -> list[Any]:
    """Cut a list with one entry a layer; lists of token numbers or labels are kept."""
    layers = first_of(("num_hidden_layers", "n_layer", "num_layers"), settings)
    return values[:LAYERS] if len(values) == layers else values


def first_of(names: tuple[str, ...], settings: dict[str, Any]) -> int | None:
    """Return the first of these settings that is there."""
    return next((settings[name] for name in names if settings.get(name)), None)
