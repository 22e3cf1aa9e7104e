"""Time the gradient at k positions: against the dense gradient, and its two paths.

    python benchmarks/crossover.py [--rounds 7] [--out FILE]

Two figures, each a ratio of median process CPU times of interleaved calls. `support_over_dense`:
the gradient at 0.5% of the positions of the quickstart model's layers, transpositions included,
over multiplying dW out and gathering. `sampled_over_blocks`: dot products per position over dense
row blocks; below 1 the first wins, and `outer_at.SAMPLED_UP_TO` states the rule drawn from it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from rounds import interleave, medians
from torch import Tensor

from sft.kernels.outer import token_last
from sft.kernels.outer_at import SAMPLED_OUTER, TILED_OUTER, outer_at
from sft.kernels.pattern import Pattern

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
TOKENS = (128, 512, 2048)
DENSITIES = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2)

# Linear layers of a block of the quickstart model: how often the input is transposed for one of a
# shape, and how often another one has done so (q for k and v, gate for up).
QUICKSTART = {(576, 576): (2, 0), (192, 576): (0, 2), (1536, 576): (1, 1), (576, 1536): (1, 0)}
DENSITY, LENGTH = 0.005, 512


def crossover(shape: tuple[int, int], tokens: int, density: float, rounds: int) -> float:
    """Return the CPU time of the sampled path over that of the blocked path."""
    left, right, pattern = _operands(shape, tokens, density)
    at, none = pattern.indices, pattern.indices[:0]
    paths = {
        "sampled": lambda: SAMPLED_OUTER(left, right, at, pattern.row_pointers, pattern.columns),
        "blocks": lambda: TILED_OUTER(left, right, at, none, none, 64),
    }
    found = _medians(paths, rounds)
    return found["sampled"] / found["blocks"]


def support(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Return the CPU seconds of the dense gradient and a gather, and of the support's alone.

    "first": the input is transposed for this layer; "later": another one has done so.
    """
    grad, x, pattern = _operands(shape, LENGTH, DENSITY)
    at, turned = pattern.indices.long(), token_last(x)
    paths = {
        "dense": lambda: (grad.t() @ x).view(-1).index_select(0, at),
        "first": lambda: outer_at(grad, token_last(x), pattern),
        "later": lambda: outer_at(grad, turned, pattern),
    }
    return _medians(paths, rounds)


def _operands(
    shape: tuple[int, int], tokens: int, density: float
) -> tuple[Tensor, Tensor, Pattern]:
    rows, cols = shape
    left, right = torch.randn(tokens, rows), torch.randn(tokens, cols)
    indices = torch.randperm(rows * cols)[: int(rows * cols * density)].sort().values
    return left, right, Pattern(indices.int(), shape)


def _medians(paths: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return medians(interleave({name: partial(_clock, p) for name, p in paths.items()}, rounds))


def _clock(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _support_table(rounds: int) -> dict[str, Any]:
    print(f"gradient at {DENSITY:.1%} of the positions over dense dW + gather, {LENGTH} tokens")
    layers, ours, dense = [], 0.0, 0.0
    for shape, (first, later) in QUICKSTART.items():
        found = support(shape, rounds)
        ours += first * found["first"] + later * found["later"]
        dense += (first + later) * found["dense"]
        shares = {n: round(found[n] / found["dense"], 3) for n in ("first", "later")}
        layers.append({"shape": shape, **shares})
        print(
            f"{'x'.join(map(str, shape)):>12}  " + "  ".join(f"{n} {r}" for n, r in shares.items())
        )
    print(f"{'a block':>12}  {ours / dense:.3f}")
    at = {"density": DENSITY, "tokens": LENGTH}
    return {**at, "layers": layers, "block": round(ours / dense, 3)}


def _crossover_table(rounds: int) -> list[dict[str, Any]]:
    print("dot products per position over dense row blocks")
    print(f"{'shape':>12} {'tokens':>6}  " + "  ".join(f"{d:>6.1%}" for d in DENSITIES))
    rows = []
    for shape in SHAPES:
        for tokens in TOKENS:
            found = [round(crossover(shape, tokens, d, rounds), 3) for d in DENSITIES]
            rows.append({"shape": shape, "tokens": tokens, "ratio": found})
            cells = "  ".join(f"{r:6.2f}" for r in found)
            print(f"{'x'.join(map(str, shape)):>12} {tokens:>6}  {cells}")
    return rows


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
    result = {
        "machine": machine(),
        "support_over_dense": _support_table(5 * args.rounds),
        "densities": DENSITIES,
        "sampled_over_blocks": _crossover_table(args.rounds),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
