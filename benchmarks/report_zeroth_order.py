"""The section on a zeroth-order step of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

CASES = {
    "floor": "two forward passes, nothing else",
    "exact": "whole model, exact",
    "sparse": "whole model, exact, sparsity 0.75",
    "gaussian": "whole model, exact, normals from the table",
    "inplace": "whole model, in place",
    "reference": "whole model, the authors' sequence",
    "support": "sparse deltas on 1 % of the linear layers, exact",
    "lora": "PEFT LoRA r=16, exact",
}


def step_section(result: dict[str, Any]) -> str:
    """Describe `benchmarks/zeroth_order_step.py`."""
    shapes = list(result["batches"])
    head = " | ".join(f"{shape}: to the floor (CPU)" for shape in shapes)
    machine = result["machine"]
    rows = [
        "## One zeroth-order step\n",
        f"`python benchmarks/zeroth_order_step.py`: {result['arguments']['model']}, fp32, "
        f"two-sided, one direction, {machine['threads']} threads of {machine['processor']}. "
        "Ratios of wall time, and of process CPU time in brackets, to two forward passes over the "
        "same batch. "
        "Extra is the peak of what lives during a step, over that of an inference and with what "
        "the method keeps beside the model; the largest trained module takes "
        f"{result['largest_module_bytes'] / 2**20:.0f} MiB.\n",
        f"| case | trained | {head} | extra |",
        "|---" * (3 + len(shapes)) + "|",
    ]
    for case, label in CASES.items():
        ratios = " | ".join(
            f"{found['wall_to_floor'][case]:.2f} ({found['cpu_to_floor'][case]:.2f})"
            for found in result["batches"].values()
        )
        trained, extra = result["trained_weights"][case], result["extra_bytes"][case]
        shown = f"{extra / 2**20:.1f} MiB" if trained else ""
        if case == "support":
            shown += f", {extra / trained:.1f} bytes a trained weight"
        rows.append(f"| {label} | {f'{trained:,}' if trained else ''} | {ratios} | {shown} |")
    return "\n".join([*rows, ""])
