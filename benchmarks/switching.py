"""Serve several adapters of one base: merge, unmerge, switch, and mix them in one batch.

    python benchmarks/switching.py [--rounds 15] [--model NAME] [--out FILE]

S2FT and SpIEL against PEFT LoRA with the same number of trained weights on the same matrices,
random values. Merging writes an adapter into W, unmerging takes it out; switching leaves the next
adapter in W: ours put kept weights back and write others, LoRA subtracts a product and adds
another. Mixing runs one forward pass in which each row has its own adapter. Times are process CPU
seconds, interleaved in one run; what all that leaves different in W is counted.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import machine
from method_cases import quiet
from peft import LoraConfig, PeftModel, get_peft_model
from rounds import interleave, medians, ratios
from torch import nn
from transformers import AutoModelForCausalLM

import sft
from sft.adapters.layer import sparse_layers
from sft.adapters.resident import enter_resident, leave_resident
from sft.embedded import folder_of

NAMES = ["first", "second", "third", "fourth"]
RANK = 16
VERBS = ("merge", "unmerge", "switch")


@dataclass(frozen=True)
class Pair:
    """A method of ours and PEFT LoRA on the same matrices.

    Args:
        ours: returns the configuration for a seed.
        targets: LoRA's `target_modules`.
    """

    ours: Callable[[int], Any]
    targets: list[str] | str


PAIRS = {
    "S2FT": Pair(
        lambda seed: sft.S2FTConfig(match_lora_rank=RANK, seed=seed), ["o_proj", "down_proj"]
    ),
    "SpIEL": Pair(
        lambda seed: sft.SpielConfig(
            match_lora_rank=RANK, target_modules="all-linear", seed=seed, growth="none"
        ),
        "all-linear",
    ),
}


def adapters(base: nn.Module, build: Callable[[int], Any]) -> PeftModel:
    """Return a model with four adapters of random values."""
    model = get_peft_model(base, build(0), adapter_name=NAMES[0])
    for seed, name in enumerate(NAMES[1:], start=1):
        model.add_adapter(name, build(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "s2ft_", "delta_")):
                parameter.normal_(std=1e-3)
    model.requires_grad_(False)
    return model.eval()


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


def clocked(call: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def merge_and_unmerge(model: PeftModel) -> dict[str, float]:
    """Merge the active adapter and take it out again; return the CPU seconds of both."""
    return {"merge": clocked(model.merge_adapter), "unmerge": clocked(model.unmerge_adapter)}


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
        return clocked(lambda: self.to(NAMES[self.turn % len(NAMES)]))


def switches(ours: PeftModel, lora: PeftModel) -> dict[str, Switch]:
    """Return how each of the two switches."""

    def to_low_rank(name: str) -> None:
        lora.unmerge_adapter()
        lora.set_adapter(name)
        lora.merge_adapter()

    enter_resident(ours)
    lora.merge_adapter()
    return {"ours": Switch(ours, ours.set_adapter), "lora": Switch(lora, to_low_rank)}


def forward(model: nn.Module, ids: torch.Tensor, names: list[str] | None) -> float:
    """Run one forward pass; return its CPU seconds."""
    extra = {} if names is None else {"adapter_names": names}
    with torch.no_grad():
        return clocked(lambda: model(input_ids=ids, **extra))


def measure(pair: Pair, base: nn.Module, rounds: int) -> dict[str, Any]:
    """Return times, ratios, and what a round of it leaves behind."""
    models = {
        "ours": adapters(copy.deepcopy(base), pair.ours),
        "lora": adapters(
            copy.deepcopy(base), lambda _: LoraConfig(r=RANK, target_modules=pair.targets)
        ),
    }
    before = {key: weights(model) for key, model in models.items()}
    merging = interleave(
        {key: lambda model=model: merge_and_unmerge(model) for key, model in models.items()}, rounds
    )
    mixing = medians(_mixed(base, models, rounds))
    made = switches(models["ours"], models["lora"])
    held = {name: layer.content for name, layer in sparse_layers(models["ours"]).items()}
    switching = interleave({key: switch.step for key, switch in made.items()}, rounds)
    moved = sum(layer.content != held[n] for n, layer in sparse_layers(models["ours"]).items())
    assert moved == len(held) or rounds % len(NAMES) == len(NAMES) - 1, "W was not switched"
    leave_resident(models["ours"])
    models["lora"].unmerge_adapter()
    seconds = {"switch": medians(switching)} | {
        verb: medians({key: [step[verb] for step in steps] for key, steps in merging.items()})
        for verb in ("merge", "unmerge")
    }
    return {
        "weights_of_an_adapter": {
            key: sum(p.numel() for n, p in model.named_parameters() if f".{NAMES[0]}" in n)
            for key, model in models.items()
        },
        "weights_of_the_matrices": sum(tensor.numel() for tensor in before["ours"].values()),
        "verbs": {
            verb: {key: round(value, 5) for key, value in seconds[verb].items()}
            | {"lora_over_ours": round(seconds[verb]["lora"] / seconds[verb]["ours"], 2)}
            for verb in VERBS
        },
        "share_of_weights_left_different": {
            key: changed(before[key], model) for key, model in models.items()
        },
        "mixed_batch_cpu_seconds": {key: round(value, 4) for key, value in mixing.items()},
        "mixed_batch_to_base": ratios(mixing, "base"),
    }


def _mixed(base: nn.Module, models: dict[str, PeftModel], rounds: int) -> dict[str, list[float]]:
    ids = torch.randint(0, base.config.vocab_size, (8, 64))
    names = [NAMES[row % len(NAMES)] for row in range(len(ids))]
    passes: dict[str, Callable[[], float]] = {
        key: lambda model=model: forward(model, ids, names) for key, model in models.items()
    }
    passes["base"] = lambda: forward(base, ids, None)
    return interleave(passes, max(1, rounds // 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/switching.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    quiet()
    folder = args.model if Path(args.model).is_dir() else folder_of(args.model)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
    result: dict[str, Any] = {
        "machine": machine(),
        "model": args.model,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "pairs": {name: measure(PAIRS[name], base, args.rounds) for name in args.only},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in result["pairs"].items():
        print(name, json.dumps(found))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
