"""Time a zeroth-order step with noise by plain torch and by compiled code (SFT_NATIVE=1).

    python benchmarks/native_noise.py [--rounds 5] [--out FILE]

One model, the batch shapes of `zeroth_order_step.py`, all cases interleaved. Medians of process CPU
seconds on one thread; the floor is two forward passes.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine
from transformers import AutoModelForCausalLM
from zeroth_order_cases import Case
from zeroth_order_step import SHAPES

from sft.embedded import folder_of
from sft.kernels.cpu.native import VARIABLE
from sft.kernels.noise import KINDS
from sft.optim.zeroth_order.config import ZerothOrderConfig


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return medians by batch shape: of the floor, and of each noise by either code."""
    base = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32).eval()
    cases = {"floor": Case(base, None)}
    cases |= {kind: Case(base, ZerothOrderConfig(noise=kind)) for kind in KINDS}
    found: dict[str, Any] = {}
    for shape in SHAPES:
        ids = torch.randint(0, base.config.vocab_size, shape)
        times: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for kind, case in cases.items():
                for native in "01" if kind != "floor" else "0":
                    os.environ[VARIABLE] = native
                    start = time.process_time()
                    case.step({"input_ids": ids, "labels": ids})
                    if turn:  # the first warms up, and compiles
                        label = kind if native == "0" else f"{kind}, native"
                        times.setdefault(label, []).append(time.process_time() - start)
        medians = {label: round(statistics.median(t), 3) for label, t in times.items()}
        found[f"{shape[0]} x {shape[1]}"] = medians
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    default = Path(__file__).parent / "results/native_noise.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds = measure(args.model, args.rounds)
    arguments = {"model": args.model, "rounds": args.rounds}
    result = {"machine": machine(), "arguments": arguments, "cpu_seconds": seconds}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for shape, medians in seconds.items():
        print(f"batch {shape}")
        for label, median in medians.items():
            gain = medians[label.partition(",")[0]] / median
            print(f"  {label:24} {median:7.3f} s  {median / medians['floor']:5.2f}x  {gain:5.2f}")


if __name__ == "__main__":
    main()
