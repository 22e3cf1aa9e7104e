"""What each family of Hugging Face models calls its coupled matrices.

Names are those of transformers 5, which we need anyway; version 4 had others for ViT
(attention.attention.query) and kept each expert of Mixtral in modules of its own (w1, w2, w3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sft.adapters.structure.attention import Fused, Latent, Layout, Separate
from sft.adapters.structure.feed_forward import Experts, FeedForward, FusedFeedForward
from sft.adapters.structure.groups import CoupledGroup
from sft.adapters.structure.layout import Site


class Template(Protocol):
    """One way in which a module may hold coupled matrices."""

    @property
    def groups(self) -> Callable[[Site], list[CoupledGroup]]:
        """Return the groups of a module, or none if the module isn't of this form."""
        ...


@dataclass(frozen=True)
class Family:
    """The forms of module in models of one type."""

    templates: tuple[Template, ...]


def slope_of_head(site: Site) -> str:
    """ALiBi adds to each head's scores a slope that its number sets."""
    alibi = site.setting("alibi")
    if site.setting("model_type") == "bloom" or alibi:
        return "ALiBi ties a slope to each head's number"
    return ""


def table_of_stack(site: Site) -> str:
    """T5's self-attention adds a bias that block 0 holds for all blocks of its stack."""
    if site.path.endswith("SelfAttention"):
        return "all blocks share the relative-position bias of block 0, which has a column a head"
    return ""


def falcon_layout(site: Site) -> Layout:
    """Falcon's old multi-query models store [all q | k | v], all others go group by group."""
    many = site.setting("new_decoder_architecture") or not site.setting("multi_query")
    return "grouped" if many else "segments"


LLAMA_ATTENTION = Separate("q_proj", "k_proj", "v_proj", "o_proj")
OPT_ATTENTION = Separate("q_proj", "k_proj", "v_proj", "out_proj")
BERT_ATTENTION = Separate("self.query", "self.key", "self.value", "output.dense")
GATED = FeedForward("up_proj", "down_proj", gate="gate_proj")
PLAIN = FeedForward("fc1", "fc2")
DENSE = FeedForward("dense_h_to_4h", "dense_4h_to_h")

LLAMA = Family((LLAMA_ATTENTION, GATED))
MIXTURE = Family((LLAMA_ATTENTION, GATED, Experts()))
OPT = Family((OPT_ATTENTION, PLAIN))
BERT = Family((BERT_ATTENTION, FeedForward("intermediate.dense", "output.dense")))
VIT = Family((LLAMA_ATTENTION, PLAIN))
LLAMA4_TEXT = Family((LLAMA_ATTENTION, GATED, Experts(transposed=True)))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "granite", "smollm3", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), LLAMA),
    **dict.fromkeys(("olmo2", "cohere", "stablelm"), LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), MIXTURE),
    **dict.fromkeys(("opt", "whisper", "clip", "clip_text_model", "clip_vision_model"), OPT),
    **dict.fromkeys(("siglip", "siglip_text_model", "siglip_vision_model"), OPT),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), BERT),
    **dict.fromkeys(("vit", "llama4_vision_model"), VIT),
    **dict.fromkeys(("llama4", "llama4_text"), LLAMA4_TEXT),
    "gpt_oss": Family((LLAMA_ATTENTION, Experts(transposed=True, order="pairs"))),
    "phi": Family((Separate("q_proj", "k_proj", "v_proj", "dense"), PLAIN)),
    "phi3": Family(
        (
            Fused("qkv_proj", "o_proj", "segments"),
            FusedFeedForward("gate_up_proj", "down_proj"),
        )
    ),
    "gpt2": Family(
        (
            # Cross-attention first: its [k | v] also reads as q and fewer k and v.
            Fused("c_attn", "c_proj", "segments", q="q_attn"),
            Fused("c_attn", "c_proj", "segments"),
            FeedForward("c_fc", "c_proj"),
        )
    ),
    "gpt_neox": Family((Fused("query_key_value", "dense", "grouped"), DENSE)),
    "bloom": Family((Fused("query_key_value", "dense", "grouped", tied=slope_of_head), DENSE)),
    "falcon": Family((Fused("query_key_value", "dense", falcon_layout, tied=slope_of_head), DENSE)),
    "t5": Family(
        (
            Separate("q", "k", "v", "o", tied=table_of_stack),
            FeedForward("wi_1", "wo", gate="wi_0"),
            FeedForward("wi", "wo"),
        )
    ),
    "deepseek_v3": Family(
        (
            Latent("q_b_proj"),
            Latent("q_proj"),
            GATED,
            Experts(),
        )
    ),
}

# Known, but not mapped, with the reason.
REFUSED: dict[str, str] = {
    "albert": "all its layers are one module, so a unit would be trained in all of them at once",
}
