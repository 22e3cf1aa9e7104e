"""How much of the divergence from the base a few tokens of each distribution show.

    python benchmarks/forgetting.py runs/quickstart

Prints a table: tokens kept of each distribution, bytes kept of each position, KL(base || tuned)
found, its share of that of whole distributions, and the seconds of both readings.
"""

from __future__ import annotations

import sys
import time

from sft.evaluation.forgetting import judge
from sft.evaluation.general_text import windows
from sft.evaluation.reduced import Reduced
from sft.evaluation.spec import ForgettingSpec
from sft.evaluation.target import as_tuned, find_target, open_processor, open_target, task_of


def main(folder: str) -> None:
    """Print the table for a run with an adapter."""
    target = find_target(folder)
    task = task_of(target)
    tokenizer, model = open_processor(target, task), open_target(target, task, None)
    read = windows(ForgettingSpec(), tokenizer, model)
    rows = []
    for kept in (model.config.get_text_config().vocab_size, 4096, 1024, 256, 64, 16):
        base: list[list[Reduced]] = []
        began = time.perf_counter()
        with model.disable_adapter():
            judge(model, read, keep=base, kept=kept)
        with as_tuned(model):
            found = judge(model, read, base=base)
        rows.append((kept, found.kl or 0.0, time.perf_counter() - began))
    whole = rows[0][1]
    tokens = sum(len(window) - 1 for window in read)
    print(f"{folder}: general text, {tokens:,} tokens\n")
    print("| kept | bytes a position | KL | of whole | seconds |\n|---|---|---|---|---|")
    for kept, kl, seconds in rows:
        print(f"| {kept:,} | {8 * kept:,} | {kl:.4f} | {100 * kl / whole:.1f} % | {seconds:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
