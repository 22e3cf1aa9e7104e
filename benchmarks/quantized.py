"""Train over SmolLM2-135M in 4 bits: memory of a step by kind, and its time, against QLoRA.

`python benchmarks/quantized.py [--rounds 3] [--out FILE]`

QLoRA is PEFT's LoRA of rank 16 on every linear layer but the head, over the same NF4 base: with
float32 factors as PEFT makes them, and with bfloat16 ones as TRL casts them. All cases run in one
process. Bytes are counted by storage and allocation: held between steps, kept for backward, and the
peak of a step, which is of the step that chooses new positions where a method has one. A case is
built, measured and given up before the next; the times are of a second pass, interleaved, without
windows: those of the recipe are 2 updates in 25.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from case import Case
from machine import machine
from method_cases import RANK, TARGETS, adapted, lora, lora_weights, quiet
from peft import get_peft_model
from rounds import interleave
from torch import nn

import sft
from sft.adapters.quantized import packed_modules
from sft.models import load_model
from sft.optim.adamw import SparseAdamW
from sft.recipe.schema import ModelSpec

RESULT = Path(__file__).parent / "results/quantized.json"
MODEL = "smollm2-135m-instruct"
PACKED = {"bits": "nf4", "double_quant": True}
CELLS = {"8x32": (8, 32), "4x128": (4, 128)}  # the recipes' batches are shorter than the first


def qlora(base: nn.Module) -> Case:
    """LoRA r=16, float32 factors."""
    return lora(base)


def qlora_bf16(base: nn.Module) -> Case:
    """LoRA r=16, bfloat16 factors."""
    case = lora(base)
    for parameter in case.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return case


def spiel(base: nn.Module) -> Case:
    """SpIEL, 1 %, as recipes/spiel_nf4.yaml."""
    return _spiel(base, density=0.01)


def spiel_int8(base: nn.Module) -> Case:
    """The same, the inputs of its gradient kept in int8."""
    return _spiel(base, density=0.01, saved_inputs="int8")


def spiel_matched(base: nn.Module) -> Case:
    """SpIEL with as many weights as LoRA."""
    return _spiel(base, match_lora_rank=RANK)


def _spiel(base: nn.Module, **settings: Any) -> Case:
    """Let every second update move deltas."""
    config = sft.SpielConfig(
        target_modules=TARGETS, reselect_every=2, window=1, first_full=False, **settings
    )
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    dynamics = model.base_model.dynamics("default", 10_000)
    return Case(model, SparseAdamW(trained, lr=1e-4), dynamics=dynamics)


def s2ft(base: nn.Module) -> Case:
    """S2FT, 3 % of o and down, as recipes/s2ft_nf4.yaml."""
    return adapted(base, sft.S2FTConfig(density=0.03, selection="random"))


def s2ft_matched(base: nn.Module) -> Case:
    """S2FT with as many weights as LoRA."""
    config = sft.S2FTConfig(num_weights=lora_weights(base), selection="random")
    return adapted(base, config)


CASES: dict[str, Callable[[nn.Module], Case]] = {
    build.__name__: build
    for build in (qlora, qlora_bf16, spiel, spiel_int8, spiel_matched, s2ft, s2ft_matched)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet()
    found: dict[str, dict[str, dict[str, int]]] = {cell: {} for cell in CELLS}
    for name, build in CASES.items():
        case = build(base())
        for cell, size in CELLS.items():
            kinds = found[cell][name] = memory(case, batch_of(size))
            print(cell, name, {kind: round(b / 2**20, 1) for kind, b in kinds.items()}, flush=True)
        del case
        gc.collect()
    cells = {cell: {"cases": cases, "ratio": against(cases)} for cell, cases in found.items()}
    seconds = times(batch_of(CELLS["8x32"]), args.rounds)
    result = {
        "machine": machine(), "model": MODEL, "packed": PACKED, "cells": cells,
        "step": {"cell": "8x32", "cpu_seconds": seconds, "ratio": slowness(seconds)},
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["step"]["ratio"]), f"written to {args.out}")


def base() -> nn.Module:
    """Load the packed model, as a recipe does."""
    spec = ModelSpec.model_validate({"name": MODEL, "dtype": "float32", "quantization": PACKED})
    model: nn.Module = load_model(spec, device="cpu").train()
    return model


def batch_of(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return random tokens, the same each time."""
    ids = torch.randint(5, 40_000, size, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def memory(case: Case, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return bytes by kind, and their peak in a step."""
    for _ in range(2):  # makes optimizer states, and what a method keeps of its positions
        case.step(batch)
    held = case.held_bytes()
    gradients = held.pop("gradients")
    held["frozen"] += scales(case.model)
    saved = sum(case.saved_bytes(batch).values())
    peaks = [case.peak_bytes(batch) for _ in range(2)]  # one of two moves deltas
    total = sum(held.values()) + max(peaks)
    parts = held | {"gradients": gradients, "saved": saved}
    return parts | {
        "transient": total - sum(parts.values()),
        "peak": total,
        "beyond_base": total - held["frozen"],
    }


def scales(model: nn.Module) -> int:
    """Return the bytes of the scales and codes beside packed weights."""
    found = 0
    for _, module in packed_modules(model):
        state: Any = module.weight.quant_state
        tensors = [state.absmax]
        if state.nested:
            tensors += [state.state2.absmax, state.offset]
        found += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return found


def against(found: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """Return peaks over those of either QLoRA."""
    return {
        peer: {name: round(kinds["peak"] / found[peer]["peak"], 4) for name, kinds in found.items()}
        for peer in ("qlora", "qlora_bf16")
    }


def times(batch: dict[str, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Return process CPU seconds of whole steps, by round; a round has one of each case."""
    cases = {name: build(base()) for name, build in CASES.items()}
    for case in cases.values():
        case.dynamics = None  # between two windows
        case.step({key: rows[:1, :8] for key, rows in batch.items()})
    reported = interleave({n: partial(c.step, batch) for n, c in cases.items()}, rounds)
    return {
        name: [
            round(sum(seconds for part, seconds in step.items() if part != "wall"), 3)
            for step in steps
        ]
        for name, steps in reported.items()
    }


def slowness(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return median seconds over QLoRA's."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: round(value / medians["qlora"], 3) for name, value in medians.items()}


if __name__ == "__main__":
    main()
