"""Time one training step: sparse deltas against LoRA and full fine-tuning, interleaved.

    python benchmarks/step.py [--rounds 15] [--model NAME] [--out FILE]

Every case owns a copy of the model. One round runs one step of each case, and the process CPU time
of each step is kept: on a shared machine it is steadier than the wall clock. Figures are medians
and ratios of this one run. Bytes are those autograd keeps between forward and backward, each
storage once, parameters and buffers excluded; held are parameters, indices, optimizer state.
"""

from __future__ import annotations

import os

# a spinning thread of a shared machine counts as CPU time of this process
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from rounds import interleave, medians, ratios
from step_cases import CASES, PROFILED
from transformers import AutoModelForCausalLM

from sft.embedded import folder_of


def measure(name: str, rounds: int, batch_size: int, length: int) -> dict[str, Any]:
    """Return times, ratios and bytes of all cases."""
    folder = folder_of(name) if not Path(name).is_dir() else Path(name)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, base.config.vocab_size, (batch_size, length))
    batch = {"input_ids": ids, "labels": ids}
    cases = {build.__name__: build(copy.deepcopy(base).train()) for build in CASES}
    saved = {name: case.saved_bytes(batch) for name, case in cases.items()}
    steps = {name: partial(case.step, batch) for name, case in cases.items()}
    times = interleave(steps, rounds)
    return _summary(times, saved, {name: case.held_bytes() for name, case in cases.items()})


def _summary(
    times: dict[str, list[float]], saved: dict[str, int], held: dict[str, int]
) -> dict[str, Any]:
    seconds = medians(times)
    # one cycle of S=20, A=5: one window start, four updates in the window, fifteen outside
    cycle = seconds["spiel_window_start"] + 4 * seconds["spiel_window"] + 15 * seconds["spiel"]
    seconds["spiel_cycle_mean"] = cycle / 20
    return {
        "cpu_seconds": {name: round(value, 4) for name, value in seconds.items()},
        "to_lora": ratios(seconds, "lora"),
        "to_full": ratios(seconds, "full"),
        "ratio_of_pairs_to_lora": {
            name: round(statistics.median(map(_divide, values, times["lora"])), 3)
            for name, values in times.items()
        },
        "saved_mib": {name: round(value / 2**20, 1) for name, value in saved.items()},
        "held_mib": {name: round(value / 2**20, 1) for name, value in held.items()},
        "all_cpu_seconds": {n: [round(v, 4) for v in values] for n, values in times.items()},
    }


def _divide(a: float, b: float) -> float:
    return a / b


def profile(name: str, batch_size: int, length: int) -> dict[str, dict[str, float]]:
    """Return the CPU milliseconds per step of the costliest operations, for LoRA and SpIEL."""
    base = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    ids = torch.randint(0, base.config.vocab_size, (batch_size, length))
    batch = {"input_ids": ids, "labels": ids}
    found = {}
    for build in PROFILED:
        case = build(copy.deepcopy(base).train())
        case.step(batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
            for _ in range(3):
                case.step(batch)
        rows = sorted(run.key_averages(), key=lambda row: -row.self_cpu_time_total)[:14]
        found[build.__name__] = {r.key: round(r.self_cpu_time_total / 3e3, 1) for r in rows}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="add a profile by operation")
    parser.add_argument("--renew-profile", action="store_true", help="of --out, and nothing else")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/step.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.renew_profile:
        result = json.loads(args.out.read_text())
    else:
        arguments = {k: str(v) for k, v in vars(args).items() if k not in ("out", "renew_profile")}
        result = {"machine": machine(), "arguments": arguments}
        result |= measure(args.model, args.rounds, args.batch_size, args.length)
    if args.profile or args.renew_profile:
        result["profile_ms"] = profile(args.model, args.batch_size, args.length)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for case, seconds in result["cpu_seconds"].items():
        mib = result["saved_mib"].get(case, float("nan"))
        ratios = f"{result['to_lora'][case]:5.2f}x LoRA  {result['to_full'][case]:5.2f}x full"
        print(f"{case:20} {seconds:7.3f} s  {ratios}  {mib:7.1f} MiB")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
