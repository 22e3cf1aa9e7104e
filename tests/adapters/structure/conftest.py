"""Tiny models of every family in the map, all parameters random, biases and norms included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sft.adapters.structure.probe import randomise_

Build = Callable[..., nn.Module]

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
WIDE = {"head_dim": 12}  # four heads of 12 aren't hidden_size 32
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**TOWER, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
T5 = {
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}
MIXTURE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **SIZES,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

# What it shows: the class, its configuration's class (by name), and the settings.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, **WIDE}),
    "llama-biases": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**SIZES, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, **WIDE}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", SIZES),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", SIZES),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SIZES, **WIDE}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**SIZES, **WIDE}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SIZES, **WIDE}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SIZES, **WIDE}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES),
    "cohere-norms": ("CohereForCausalLM", "CohereConfig", {**SIZES, "use_qk_norm": True}),
    "cohere": ("CohereForCausalLM", "CohereConfig", SIZES),
    "stablelm-norms": (
        "StableLmForCausalLM",
        "StableLmConfig",
        {**SIZES, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**SIZES, "use_parallel_residual": True}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**SIZES, "qk_layernorm": True}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", PLAIN),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", PLAIN),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**TOWER, **IMAGE}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    ),
    "falcon-groups": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon-multi-query": ("FalconForCausalLM", "FalconConfig", {**FALCON, "multi_query": True}),
    "falcon-heads": ("FalconForCausalLM", "FalconConfig", {**FALCON, "multi_query": False}),
    "falcon-alibi": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "multi_query": False, "alibi": True},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**SIZES, **WIDE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**SIZES, **MIXTURE, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**SIZES, **WIDE, **MIXTURE}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**SIZES, **WIDE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **SIZES,
            **WIDE,
            "intermediate_size_mlp": 40,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "llama4_vision": (
        "Llama4VisionModel",
        "Llama4VisionConfig",
        {
            **TOWER,
            **IMAGE,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "intermediate_size": 128,
        },
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**DEEPSEEK, "q_lora_rank": 16}),
    "deepseek_v3-q": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**DEEPSEEK, "q_lora_rank": None},
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": {**TOWER, **IMAGE}, "projection_dim": 16},
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**TEXT, "projection_size": 32}, "vision_config": {**TOWER, **IMAGE}},
    ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": {**SIZES, **WIDE}, "vision_config": {**TOWER, **IMAGE}},
    ),
    # Families by their look alone, which the map doesn't name.
    "unknown: gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {**GPT2, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "unknown: distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64},
    ),
}


def tiny(name: str, **settings: Any) -> nn.Module:
    """A tiny fp32 model of a family in eval mode, the same one each time."""
    model_class, config_class, sizes = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**sizes, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, model_class)(config).float().eval()
        randomise_(model)
    return model


@pytest.fixture
def build() -> Build:
    """Build a tiny model by the name of its family."""
    return tiny


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `family` once for each family."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", sorted(FAMILIES))
