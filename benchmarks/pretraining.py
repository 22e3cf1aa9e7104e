"""Time one step of pre-training from scratch: SLTrain against dense weights, and count its memory.

    python benchmarks/pretraining.py [--rounds 15] [--rank 128] [--density 0.03] [--out FILE]

The shapes of SmolLM2-135M with random weights. Both train everything: SLTrain has c B A + S in
place of the attention and feed-forward matrices. Bytes are those of parameters, indices and both
moments of AdamW, counted tensor by tensor.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from rounds import interleave, medians, ratios
from step_cases import Case
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import sft
from sft.adapters.layer import sparse_layers
from sft.embedded import folder_of


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return the Trainer's default optimizer over everything that trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def state_bytes(case: Case) -> int:
    """Count the bytes of parameters, indices and the optimizer's moments, each storage once."""
    assert case.optimizer is not None
    tensors = [*case.model.parameters(), *case.model.buffers()]
    for layer in sparse_layers(case.model).values():
        pattern = layer.pattern("default")
        assert pattern is not None
        tensors += [pattern.indices, pattern.columns, pattern.row_pointers]
    for state in case.optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, torch.Tensor)]
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(stored.values())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return times, ratios, parameters and bytes of both."""
    config = AutoConfig.from_pretrained(folder_of(args.model))
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config).train()
    sparse = sft.pretrain_model(
        config, sft.SLTrainConfig(form="pretrain", r=args.rank, density=args.density)
    ).train()
    cases = {
        "dense": Case(dense, fused_adamw(dense)),
        "sltrain": Case(sparse, fused_adamw(sparse)),
    }
    ids = torch.randint(0, config.vocab_size, (args.batch_size, args.length))
    batch = {"input_ids": ids, "labels": ids}
    saved = {name: case.saved_bytes(batch) for name, case in cases.items()}
    times = interleave({name: partial(c.step, batch) for name, c in cases.items()}, args.rounds)
    seconds = medians(times)
    held = {name: state_bytes(case) for name, case in cases.items()}
    trained = {
        name: sum(p.numel() for p in case.model.parameters() if p.requires_grad)
        for name, case in cases.items()
    }
    return {
        "cpu_seconds": {name: round(value, 4) for name, value in seconds.items()},
        "to_dense": ratios(seconds, "dense"),
        "trained_parameters": trained,
        "state_bytes": held,
        "state_to_dense": round(held["sltrain"] / held["dense"], 4),
        "saved_mib": {name: round(value / 2**20, 1) for name, value in saved.items()},
        "all_cpu_seconds": {n: [round(v, 4) for v in values] for n, values in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.03)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/pretraining.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    result["arguments"].pop("out")
    result |= measure(args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for key in ("cpu_seconds", "to_dense", "trained_parameters", "state_bytes", "state_to_dense"):
        print(f"{key}: {result[key]}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
