"""The tables of docs/memory.md: the loss in chunks, and a base on disk."""

from __future__ import annotations

from typing import Any

START, END = "<!-- from benchmarks/report.py -->\n", "<!-- end -->"
MIB = 2**20
LOSSES = {
    "whole": "whole logits, `F.cross_entropy`",
    "chunked": "in chunks",
    "torch": "`F.linear_cross_entropy`",
}
RUNS = {
    "memory": "in memory",
    "disk": "`base: disk`",
    "memory_checkpointed": "in memory, checkpointing",
    "disk_checkpointed": "`base: disk`, checkpointing",
}


def page(text: str, result: dict[str, Any]) -> str:
    """Return the page with its figures brought up to date."""
    before, _, rest = text.partition(START)
    return before + START + tables(result) + END + rest.partition(END)[2]


def tables(result: dict[str, Any]) -> str:
    """Describe `benchmarks/memory.py`."""
    machine = result["machine"]
    head = (
        f"`python benchmarks/memory.py`, {machine['threads']} threads of {machine['processor']}; "
        "times are medians of CPU seconds.\n"
    )
    return "\n".join([head, _losses(result["loss"]), _runs(result["offload"])])


def _losses(found: dict[str, Any]) -> str:
    rows = [
        f"The loss and the gradient of what its head reads, of {found['width']} entries over "
        f"{found['vocabulary']:,} words. MiB are the most that is alive at once, and the largest "
        "tensor; torch's is one operation, whose own memory is not seen.\n",
        "| loss | labels | at once | largest | seconds | to whole logits |",
        "|---" * 6 + "|",
    ]
    for labels, one in found["labels"].items():
        for name, ratio in one["ratio"].items():
            sizes = [one[key].get(name) for key in ("peak_bytes", "largest_bytes")]
            cells = ["" if size is None else f"{size / MIB:.0f}" for size in sizes]
            seconds = sorted(one["cpu_seconds"][name])
            cells += [f"{seconds[len(seconds) // 2]:.2f}", f"{ratio:.2f}"]
            rows.append(f"| {LOSSES[name]} | {labels} | {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def _runs(found: dict[str, Any]) -> str:
    runs, model, (batch, length) = found["runs"], found["model"], found["batch"]
    floor = runs["nothing"]["peak_anonymous_bytes"]
    rows = [
        f"Training a Llama of {model['layers']} layers, {model['width']} wide, with "
        f"{runs['memory']['weight_bytes'] / MIB:.0f} MiB of float32 weights, by SpIEL on {batch} x "
        f"{length} tokens, one process each. Files are read just after they were written, so "
        "mostly from the page cache; with a base on disk layers run aside, which is part of its "
        "time. MiB are the peak of the process's anonymous memory, then what of it is above a run "
        f"of next to no model, {floor / MIB:.0f}.\n",
        "| frozen weights | peak | above | step, to in memory |",
        "|---" * 4 + "|",
    ]
    for name, label in RUNS.items():
        peak = runs[name]["peak_anonymous_bytes"]
        rows.append(
            f"| {label} | {peak / MIB:.0f} | {(peak - floor) / MIB:.0f} "
            f"| {found['ratio'][name]:.2f} |"
        )
    return "\n".join([*rows, ""])
