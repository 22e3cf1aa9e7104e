"""Time the two paths of `outer_at` against each other: where does the crossover lie?

    python benchmarks/crossover.py [--rounds 7] [--out FILE]

For every shape, number of tokens and density, both paths run interleaved; the figure is the ratio
of median process CPU times, dot products per position over dense row blocks. Below 1 the first
wins; `outer_at.SAMPLED_UP_TO` states the rule drawn from it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine

from sft.kernels.outer_at import _row_blocks, _sampled
from sft.kernels.pattern import Pattern

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
TOKENS = (128, 512, 2048)
DENSITIES = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2)


def ratio(shape: tuple[int, int], tokens: int, density: float, rounds: int) -> float:
    """Return the CPU time of the sampled path over that of the blocked path."""
    rows, cols = shape
    left, right = torch.randn(tokens, rows), torch.randn(tokens, cols)
    indices = torch.randperm(rows * cols)[: int(rows * cols * density)].sort().values
    pattern = Pattern(indices.int(), shape)
    times: dict[str, list[float]] = {"sampled": [], "blocks": []}
    for turn in range(rounds + 1):
        for name, path in (("sampled", _sampled), ("blocks", _row_blocks)):
            seconds = _clock(lambda path=path: path(left, right, pattern))
            if turn:
                times[name].append(seconds)
    return statistics.median(times["sampled"]) / statistics.median(times["blocks"])


def _clock(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/crossover.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    print(f"{'shape':>12} {'tokens':>6}  " + "  ".join(f"{d:>6.1%}" for d in DENSITIES))
    for shape in SHAPES:
        for tokens in TOKENS:
            found = [round(ratio(shape, tokens, d, args.rounds), 3) for d in DENSITIES]
            rows.append({"shape": shape, "tokens": tokens, "ratio": found})
            cells = "  ".join(f"{r:6.2f}" for r in found)
            print(f"{'x'.join(map(str, shape)):>12} {tokens:>6}  {cells}")
    result = {"machine": machine(), "densities": DENSITIES, "sampled_over_blocks": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
