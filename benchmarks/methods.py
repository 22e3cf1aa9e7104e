"""Measure a training step of every method and peer: time by part, bytes, memory, file.

    python benchmarks/methods.py [--minutes 5] [--only CASE ...] [--cells CELL ...] [--out FOLDER]

A cell is a dtype, a batch and a length. Its cases run interleaved in one process, one step of each
a round, and every round keeps the process CPU seconds of forward, backward, optimizer and
selection: on a shared machine they are steadier than the wall clock, which is kept as well. Compare
ratios within a cell. Most cases train as many weights as LoRA of rank 16 on every linear layer but
the head. Bytes kept for backward are counted by storage, without what is held anyway; the peak of a
step is counted by allocation; peak memory of the process, profile and file size come from a
process of each case's own. One file for each case and cell, in the layout of PEFT's method
comparison (`peft_schema.py`).
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
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from alone import alone
from case import Case
from method_cases import CASES, MORE, OURS, PEERS, quiet
from peft_schema import record
from rounds import interleave
from transformers import AutoModelForCausalLM

from sft.embedded import folder_of

RESULTS = Path(__file__).parent / "results/methods"
ALL = tuple(build.__name__ for build in (*PEERS, *OURS))
SWEPT = ("floor", "lora", "shira", "spiel_sparse", "s2ft_sparse")
CLOSE = ("floor", "lora", "spiel_sparse", "s2ft_sparse")
EXTRA = ("floor", "lora", *(build.__name__ for build in MORE))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Where cases are compared, and how long for.

    Args:
        dtype: of the base model.
        batch: rows.
        length: tokens in each.
        cases: which.
        share: of the time, in parts of the sum over all cells.
        rounds: at least so many.
        alone: run each case in a process of its own as well.
        suffix: tells two cells of one size apart.
    """

    dtype: str
    batch: int
    length: int
    cases: tuple[str, ...]
    share: float
    rounds: int = 2
    alone: bool = False
    suffix: str = ""

    @property
    def name(self) -> str:
        """What files and options call it."""
        return f"{self.dtype}-{self.batch}x{self.length}{self.suffix}"


CELLS = (
    Cell(dtype="float32", batch=4, length=128, cases=ALL, share=9, rounds=3, alone=True),
    # where a few hundredths are to be told apart: many short rounds
    Cell(dtype="float32", batch=4, length=128, cases=CLOSE, share=6, rounds=9, suffix="-close"),
    Cell(dtype="float32", batch=1, length=128, cases=ALL, share=2),
    Cell(dtype="float32", batch=4, length=128, cases=EXTRA, share=2, suffix="-more"),
    Cell(dtype="float32", batch=1, length=512, cases=SWEPT, share=2),
    Cell(dtype="float32", batch=4, length=512, cases=SWEPT, share=4),
    Cell(dtype="bfloat16", batch=4, length=128, cases=ALL, share=3),
    Cell(dtype="bfloat16", batch=1, length=128, cases=ALL, share=1),
    Cell(dtype="bfloat16", batch=4, length=512, cases=SWEPT, share=2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--minutes", type=float, default=5, help="of timing, all cells together")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="*", choices=names, default=names)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet()
    args.out.mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in CELLS if cell.name in args.cells]
    seconds = 60 * args.minutes / sum(cell.share for cell in cells)
    created = datetime.now(timezone.utc)
    for cell, cases in _with_cases(cells, args.model, args.only):
        began = time.monotonic()
        measured = measure(cell, cases, args.model, seconds * cell.share)
        spent = time.monotonic() - began
        for name, found in measured.items():
            found = record(created=created, total_seconds=spent, model_id=args.model, **found)
            path = args.out / f"{name}--{cell.name}.json"
            path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{cell.name}: {len(measured)} cases, {spent:.0f} s", file=sys.stderr)
        show(measured)
    print(f"written to {args.out}")


def _with_cases(
    cells: list[Cell], model: str, only: list[str]
) -> Iterator[tuple[Cell, dict[str, Case]]]:
    """Build each dtype's cases once; a case that no later cell wants is given up."""
    for dtype in dict.fromkeys(cell.dtype for cell in cells):
        own = [cell for cell in cells if cell.dtype == dtype]
        base = AutoModelForCausalLM.from_pretrained(_folder(model), dtype=getattr(torch, dtype))
        built: dict[str, Case] = {}
        for place, cell in enumerate(own):
            wanted = [name for name in cell.cases if name in only]
            for name in wanted:
                if name not in built:
                    torch.manual_seed(0)
                    built[name] = CASES[name](copy.deepcopy(base).train())
            yield cell, {name: built[name] for name in wanted}
            later = {name for following in own[place + 1 :] for name in following.cases}
            built = {name: case for name, case in built.items() if name in later}


def _folder(model: str) -> str:
    return model if Path(model).is_dir() else str(folder_of(model))


def measure(
    cell: Cell, cases: dict[str, Case], model: str, seconds: float
) -> dict[str, dict[str, Any]]:
    """Return what `record` takes, for each case of a cell."""
    torch.manual_seed(0)
    vocabulary = next(iter(cases.values())).model.config.vocab_size
    ids = torch.randint(0, vocabulary, (cell.batch, cell.length))
    batch = {"input_ids": ids, "labels": ids}
    apart = _apart(cell, cases, model, ids)
    for case in cases.values():
        case.step({key: rows[:1, :8] for key, rows in batch.items()})  # makes optimizer states
    saved = {name: dict(case.saved_bytes(batch)) for name, case in cases.items()}
    peak = {name: case.peak_bytes(batch) for name, case in cases.items()}  # and warms up
    steps = {name: partial(case.step, batch) for name, case in cases.items()}
    times = interleave(steps, cell.rounds, warm_up=False, seconds=seconds)
    return {
        name: {
            "experiment": f"{name}/{model}-{cell.name}",
            "train_config": _train_config(cell, case, len(times[name])),
            "adapter": getattr(case.model, "peft_config", {}).get("default"),
            "counts": {
                "num_trainable_params": case.num_trained(),
                "num_total_params": sum(p.numel() for p in case.model.parameters()),
            },
            "loss": case.loss,
            "times": times[name],
            "held": case.held_bytes(),
            "saved": saved[name],
            "peak": peak[name],
            "alone": apart.get(name, {}),
        }
        for name, case in cases.items()
    }


def _apart(
    cell: Cell, cases: dict[str, Case], model: str, ids: torch.Tensor
) -> dict[str, dict[str, Any]]:
    if not cell.alone:
        return {}
    folder = _folder(model)
    base = alone(None, folder, cell.dtype, ids)["peak_rss"]
    found = {name: alone(name, folder, cell.dtype, ids) for name in cases}
    for one in found.values():
        one["peak_rss_over_base"] = one.pop("peak_rss") - base
    return found


def _train_config(cell: Cell, case: Case, steps: int) -> dict[str, Any]:
    optimizer = case.optimizer
    return {
        "dtype": cell.dtype,
        "max_seq_length": cell.length,
        "batch_size": cell.batch,
        "max_steps": steps,
        "seed": 0,
        "optimizer_type": None if optimizer is None else type(optimizer).__name__,
        "optimizer_kwargs": {} if optimizer is None else {"lr": optimizer.param_groups[0]["lr"]},
    }


def show(measured: dict[str, dict[str, Any]]) -> None:
    """Print a line for each case: median CPU seconds by part, and bytes kept."""
    for name, found in measured.items():
        times = found["times"]
        cpu = {k: sorted(t[k] for t in times)[len(times) // 2] for k in times[0]}
        parts = "  ".join(f"{part} {seconds:6.3f}" for part, seconds in cpu.items())
        print(f"{name:16} {parts}  saved {sum(found['saved'].values()) / 2**20:6.0f} MiB")


if __name__ == "__main__":
    main()
