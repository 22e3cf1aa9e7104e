"""Plan the recipes whose models are not at hand, from their configurations alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def configurations() -> dict[str, Any]:
    """Return the published configurations of the models that the recipes name."""
    from transformers import DebertaV2Config, LlamaConfig, MistralConfig, OPTConfig

    llama3: dict[str, Any] = {
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    }
    return {
        "meta-llama/Llama-2-7b-hf": LlamaConfig(architectures=["LlamaForCausalLM"]),
        "meta-llama/Meta-Llama-3-8B": LlamaConfig(
            architectures=["LlamaForCausalLM"], intermediate_size=14336, **llama3
        ),
        "HuggingFaceH4/mistral-7b-sft-beta": MistralConfig(architectures=["MistralForCausalLM"]),
        "facebook/opt-13b": OPTConfig(
            architectures=["OPTForCausalLM"], hidden_size=5120, ffn_dim=20480,
            num_hidden_layers=40, num_attention_heads=40, word_embed_proj_dim=5120,
        ),
        "microsoft/deberta-v3-base": DebertaV2Config(
            architectures=["DebertaV2ForMaskedLM"], vocab_size=128100, hidden_size=768,
            num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            type_vocab_size=0, relative_attention=True, position_buckets=256,
            norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
        ),
    }  # fmt: skip


def main(hub: Path, recipes: list[str]) -> None:
    """Print a plan of each recipe, as JSON by name."""
    os.environ |= {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    for name, config in configurations().items():
        folder = hub / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        config.save_pretrained(folder / "snapshots" / ("0" * 40))
    from sft.plan.batch import batch_of
    from sft.plan.devices import Device
    from sft.plan.placement import Placement
    from sft.plan.plan import plan
    from sft.recipe.load import load_recipe

    found = {}
    for name in recipes:
        recipe = load_recipe(name)
        made = plan(recipe, batch_of(recipe), Device("80 GB", 80 * 10**9, "a100"), Placement())
        found[name] = {"peak": made.peak, "parts": made.device_bytes}
        print(name, f"{made.peak / 1e9:.1f} GB", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
