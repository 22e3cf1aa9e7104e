"""The section on kernels of docs/performance.md."""

from __future__ import annotations

from typing import Any


def section(result: dict[str, Any]) -> str:
    """Describe `benchmarks/kernel_costs.py`."""
    machine = result["machine"]
    rows = [
        "## Ops on the CPU\n",
        "`python benchmarks/kernel_costs.py`: milliseconds of CPU time of an op, and of what plain "
        f"torch would do, interleaved; {machine['threads']} threads of {machine['processor']}. "
        "Noise is drawn by counters, the same on every device, which torch's own is not; AdamW "
        "counts an age for each entry; what is kept in int8 is rounded without bias.\n",
        "| op | on | ms | beside | ratio |",
        "|---" * 5 + "|",
    ]
    for name, found in result["cpu"].items():
        cells = f"{found['about']} | {found['ms']:.2f} | {found['beside']} | {found['ratio']:.2f}"
        rows.append(f"| `{name}` | {cells} |")
    rows.append("")
    if result.get("gpu"):
        rows += ["Measured on a GPU (`do_bench`):\n", "| op | ms | ratio |", "|---|---|---|"]
        for name, found in result["gpu"].items():
            rows.append(f"| `{name}` | {found['ms']:.4f} | {found['ratio']:.2f} |")
        rows.append("")
    if "compiled" in result:
        rows += [*_audit(result), "", *_model(result), ""]
    return "\n".join(rows)


def _audit(result: dict[str, Any]) -> list[str]:
    found = result["compiled"]
    targets = ", ".join(dict.fromkeys(row["target"] for row in found))
    rows = [
        f"## Compiled code of the GPU kernels\n\nTriton {result['triton']}, for {targets}, built "
        "without a GPU and read back: registers of a thread, spills, shared memory of a program, "
        "share of a multiprocessor's warps that fit, instructions, and of the loads from memory in "
        "the hot loop (or all of the code where there is none) those of 128 bits. The tests hold "
        "every kernel to its budget on sm_80, sm_90, sm_100 and gfx942.\n",
        "| build | kernel | target | registers | spills | shared | occupancy | instructions | wide "
        "loads | tensor cores |",
        "|---" * 10 + "|",
    ]
    for row in found:
        wide = f"{row['hot_wide_loads']} of {row['hot_loads']}"
        rows.append(
            f"| {row['build']} | `{row['kernel']}` | {row['target']} | {row['registers']} "
            f"| {row['spills']} | {row['shared']} | {row['occupancy']:.2f} | {row['instructions']} "
            f"| {wide} | {'yes' if row['tensor_cores'] else ''} |"
        )
    return rows


def _model(result: dict[str, Any]) -> list[str]:
    rows = [
        "## Lower bounds on an H100: model, not measured\n\nThe slowest of memory (3.35 TB/s), "
        "second-level cache (5.5 TB/s, assumed), instruction issue and tensor cores, each at an "
        "efficiency that well-made kernels reach, and never less than a launch of 3 us. "
        "Instructions are counted in the compiled code above. No GPU has run them.\n",
        "| build | size | us, model | set by | MiB moved |",
        "|---" * 5 + "|",
    ]
    for row in result["compiled"]:
        model = row["model"]
        if model is not None:
            rows.append(
                f"| {row['build']} | {model['about']} | {model['microseconds']:.1f} "
                f"| {model['set_by']} | {model['memory_mib']:.1f} |"
            )
    return rows
