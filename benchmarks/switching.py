"""Serve several adapters of one base: switch between them, and mix them in one batch.

    python benchmarks/switching.py [--rounds 15] [--model NAME] [--out FILE]

S2FT and LoRA with the same number of trained weights on the same matrices, random values. Switching
leaves the next adapter in W: S2FT puts kept lines back and writes others, LoRA subtracts a product
and adds another. Mixing runs one forward pass in which each row has its own adapter. Times are
process CPU seconds, interleaved in one run; what a switch leaves different in W is counted.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from peft import LoraConfig, PeftModel, get_peft_model
from rounds import interleave, medians, ratios
from torch import nn
from transformers import AutoModelForCausalLM

import sft
from sft.adapters.layer import sparse_layers
from sft.adapters.resident import enter_resident
from sft.embedded import folder_of

TARGETS = ["o_proj", "down_proj"]
NAMES = ["first", "second", "third", "fourth"]
RANK = 16


def adapters(base: nn.Module, build: Callable[[int], Any]) -> PeftModel:
    """Return a model with four adapters of random values."""
    model = get_peft_model(base, build(0), adapter_name=NAMES[0])
    for seed, name in enumerate(NAMES[1:], start=1):
        model.add_adapter(name, build(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "s2ft_" in name:
                parameter.normal_(std=1e-3)
    model.requires_grad_(False)
    return model.eval()


def s2ft(base: nn.Module) -> PeftModel:
    """Four S2FT adapters with as many weights as LoRA of rank 16 trains."""
    return adapters(base, lambda seed: sft.S2FTConfig(match_lora_rank=RANK, seed=seed))


def lora(base: nn.Module) -> PeftModel:
    """Four LoRA adapters on the same matrices."""
    return adapters(base, lambda seed: LoraConfig(r=RANK, target_modules=TARGETS))


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copy the weights of the adapted layers."""
    return {
        name: module.get_base_layer().weight.detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "get_base_layer")
    }


def changed(before: dict[str, torch.Tensor], model: PeftModel) -> float:
    """Return the share of weights that are not what they were."""
    now = weights(model)
    count = sum(int((now[name] != tensor).sum()) for name, tensor in before.items())
    return count / sum(tensor.numel() for tensor in before.values())


class Switch:
    """Brings one adapter after another into W.

    Args:
        model: has several adapters.
        to: switches to the adapter of a name.
    """

    def __init__(self, model: PeftModel, to: Callable[[str], None]) -> None:
        self.model, self.to, self.turn = model, to, 0

    def step(self) -> float:
        """Switch to the next; return the CPU seconds."""
        self.turn += 1
        start = time.process_time()
        self.to(NAMES[self.turn % len(NAMES)])
        return time.process_time() - start


def switches(model_s2ft: PeftModel, model_lora: PeftModel) -> dict[str, Switch]:
    """Return how each of the two switches."""

    def to_slice(name: str) -> None:
        model_s2ft.set_adapter(name)
        for layer in sparse_layers(model_s2ft).values():
            layer.settle()

    def to_low_rank(name: str) -> None:
        model_lora.unmerge_adapter()
        model_lora.set_adapter(name)
        model_lora.merge_adapter()

    enter_resident(model_s2ft)
    model_lora.merge_adapter()
    return {"s2ft": Switch(model_s2ft, to_slice), "lora": Switch(model_lora, to_low_rank)}


def forward(model: PeftModel, ids: torch.Tensor, names: list[str] | None) -> float:
    """Run one forward pass; return its CPU seconds."""
    start = time.process_time()
    with torch.no_grad():
        model(input_ids=ids, **({} if names is None else {"adapter_names": names}))
    return time.process_time() - start


def measure(name: str, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return times, ratios and what a round of switches leaves behind."""
    folder = folder_of(name) if not Path(name).is_dir() else Path(name)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    models = {"s2ft": s2ft(copy.deepcopy(base)), "lora": lora(copy.deepcopy(base))}
    trained = {
        n: sum(p.numel() for k, p in m.named_parameters() if f".{NAMES[0]}" in k)
        for n, m in models.items()
    }
    ids = torch.randint(0, base.config.vocab_size, (8, 64))
    names = [NAMES[row % len(NAMES)] for row in range(len(ids))]
    mixed: dict[str, Callable[[], float]] = {
        key: (lambda model=model: forward(model, ids, names)) for key, model in models.items()
    }
    mixed["base"] = lambda: forward(base, ids, None)
    mixing = medians(interleave(mixed, rounds))
    before = {key: weights(model) for key, model in models.items()}
    made = switches(models["s2ft"], models["lora"])
    switching = medians(interleave({key: switch.step for key, switch in made.items()}, rounds))
    for layer in sparse_layers(models["s2ft"]).values():
        layer.leave_resident()
    models["lora"].unmerge_adapter()
    return {
        "weights_of_an_adapter": trained,
        "switch_cpu_seconds": {key: round(value, 5) for key, value in switching.items()},
        "switch_to_lora": ratios(switching, "lora"),
        "share_of_weights_left_different": {
            key: changed(before[key], model) for key, model in models.items()
        },
        "mixed_batch_cpu_seconds": {key: round(value, 4) for key, value in mixing.items()},
        "mixed_batch_to_base": ratios(mixing, "base"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/switching.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    result["arguments"].pop("out")
    result |= measure(args.model, args.rounds, getattr(torch, args.dtype))
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for key, value in result.items():
        if key not in ("machine", "arguments"):
            print(f"{key}: {value}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
