"""Time one zeroth-order step against its floor, two forward passes; count its bytes.

    python benchmarks/zeroth_order_step.py [--rounds 9] [--out FILE]

All cases but the adapters share one model and are interleaved, at two batch shapes: that of
`step.py` and that of the quickstart recipe. Wall and process CPU seconds are medians; ratios are to
the floor of the same run. Extra bytes are the peak of what lives during a step, over the same peak
of an inference: torch's storages and NumPy's memory, each counted as it is allocated.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from allocations import peak_bytes
from machine import machine
from torch import nn
from transformers import AutoModelForCausalLM
from zeroth_order_cases import CASES, Case

from sft.embedded import folder_of

SHAPES = ((4, 128), (8, 17))


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return times and ratios by batch shape, and bytes."""
    folder = folder_of(name) if not Path(name).is_dir() else Path(name)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cases = {build.__name__: build(base, folder) for build in CASES}
    found: dict[str, Any] = {"batches": {}}
    for shape in SHAPES:
        ids = torch.randint(0, base.config.vocab_size, shape)
        batch = {"input_ids": ids, "labels": ids}
        times = _interleaved({n: partial(c.step, batch) for n, c in cases.items()}, rounds)
        found["batches"][f"{shape[0]} x {shape[1]}"] = _summary(times)
        if shape is SHAPES[0]:
            found["extra_bytes"] = {n: _extra(case, batch) for n, case in cases.items()}
    found["trained_weights"] = {n: case.trained for n, case in cases.items()}
    found["largest_module_bytes"] = _largest_module(base)
    return found


def _interleaved(
    steps: dict[str, Callable[[], None]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, CPU) seconds of each step by round; the first round warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            seconds = (time.perf_counter() - wall, time.process_time() - cpu)
            if turn:
                times[name].append(seconds)
    return times


def _summary(times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index, clock in enumerate(("wall", "cpu")):
        medians = {n: statistics.median(t[index] for t in rows) for n, rows in times.items()}
        found[f"{clock}_seconds"] = {n: round(s, 4) for n, s in medians.items()}
        found[f"{clock}_to_floor"] = {n: round(s / medians["floor"], 3) for n, s in medians.items()}
        found[f"all_{clock}_seconds"] = {
            n: [round(t[index], 4) for t in rows] for n, rows in times.items()
        }
    return found


def _extra(case: Case, batch: dict[str, torch.Tensor]) -> int:
    """Return the bytes of a step beyond those of an inference, with what the case holds."""
    inference = peak_bytes(lambda: case.inference(batch))
    return peak_bytes(lambda: case.step(batch)) - inference + case.held_bytes()


def _largest_module(model: nn.Module) -> int:
    return max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for module in model.modules()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    default = Path(__file__).parent / "results/zeroth_order_step.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    arguments = {key: str(value) for key, value in vars(args).items() if key != "out"}
    result = {"machine": machine(), "arguments": arguments} | measure(args.model, args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for shape, found in result["batches"].items():
        print(f"batch {shape}")
        for name, seconds in found["wall_seconds"].items():
            wall, cpu = found["wall_to_floor"][name], found["cpu_to_floor"][name]
            print(f"  {name:12} {seconds:7.3f} s  {wall:5.2f}x wall  {cpu:5.2f}x CPU")
    for name, extra in result["extra_bytes"].items():
        print(f"{name:14} {extra / 2**20:8.1f} MiB extra")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
