"""Measure the ops on the CPU, audit their GPU code, and bound its time on an H100 by a model.

    python benchmarks/kernel_costs.py [--rounds 9] [--targets sm_90 ...] [--out FILE]

CPU: process CPU time of each op beside what plain torch would do, interleaved. GPU code: every
build of tests/kernels/device_cases is compiled for each target, without a GPU, and read back.
Model: the slowest of memory, cache, instruction issue and tensor cores; it is not a measurement.
Where there is a GPU, Triton times the same ops there.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from machine import machine
from op_cases import OPS
from rounds import interleave, medians

sys.path.append(str(Path(__file__).parent.parent / "tests/kernels"))  # device_cases


def on_cpu(rounds: int) -> dict[str, dict[str, Any]]:
    """Return CPU milliseconds of each op and of its counterpart."""
    found = {}
    for name, case in OPS.items():
        torch.manual_seed(0)
        ours, plain = case.make("cpu")
        seconds = medians(interleave({"ours": _repeated(ours), "plain": _repeated(plain)}, rounds))
        found[name] = {"about": case.about, "beside": case.beside} | {
            "ms": round(1000 * seconds["ours"], 4),
            "plain_ms": round(1000 * seconds["plain"], 4),
            "ratio": round(seconds["ours"] / seconds["plain"], 3),
        }
        print(f"{name:26} {found[name]['ms']:9.3f} ms  {found[name]['ratio']:6.2f} of plain")
    return found


def _repeated(call: Callable[[], object]) -> Callable[[], float]:
    """Return the CPU seconds of a call: short ones run until they can be clocked."""
    call()
    start = time.process_time()
    call()
    times = max(1, int(0.01 / max(1e-5, time.process_time() - start)))

    def clock() -> float:
        begun = time.process_time()
        for _ in range(times):
            call()
        return (time.process_time() - begun) / times

    return clock


def on_gpu() -> dict[str, dict[str, float]]:
    """Return milliseconds of each op and of its counterpart on a GPU, none where there is none."""
    if not torch.cuda.is_available():
        return {}
    from triton.testing import do_bench

    found = {}
    for name, case in OPS.items():
        ours, plain = (do_bench(call) for call in case.make("cuda"))
        found[name] = {"ms": ours, "plain_ms": plain, "ratio": round(ours / plain, 3)}
    return found


def compiled(targets: list[str]) -> list[dict[str, Any]]:
    """Return what was read from every kernel of every build, and the model's bound on sm_90."""
    from device_cases.base import collected
    from kernel_model import bound
    from without_gpu.audit import audit, loads
    from without_gpu.compiler import compiled_for

    rows = []
    for target in targets:
        for name, build in collected("BUILDS").items():
            with compiled_for(target) as kernels:
                build.launch()
            audits = {kernel.metadata.name: audit(kernel) for kernel in kernels}
            for kernel, found in audits.items():
                every, wide = loads(found.hot)
                modelled = bound(name, found) if target == "sm_90" else None
                rows.append(
                    {
                        "build": name,
                        "kernel": kernel,
                        "target": target,
                        "registers": found.registers,
                        "spills": found.spills,
                        "shared": found.shared,
                        "occupancy": round(found.occupancy, 3),
                        "instructions": found.instructions.total(),
                        "hot": found.hot.total(),
                        "hot_loads": every,
                        "hot_wide_loads": wide,
                        "tensor_cores": found.uses_tensor_cores,
                        "cas": found.compares_and_swaps,
                        "model": modelled,
                    }
                )
        print(f"{target}: {len(rows)} kernels")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--targets", nargs="*", default=["sm_90"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/kernels.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"machine": machine(), "cpu": on_cpu(args.rounds), "gpu": on_gpu()}
    if find_spec("triton") is not None:
        result |= {"triton": version("triton"), "compiled": compiled(args.targets)}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
