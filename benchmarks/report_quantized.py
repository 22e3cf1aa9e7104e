"""The section on packed bases of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

LABELS = {
    "qlora": "PEFT LoRA r=16 (QLoRA)",
    "qlora_bf16": "the same, factors in bfloat16",
    "spiel": "SpIEL 1 %",
    "spiel_int8": 'SpIEL 1 %, `saved_inputs="int8"`',
    "spiel_matched": "SpIEL, LoRA's number of weights",
    "s2ft": "S2FT 3 % of o and down",
    "s2ft_matched": "S2FT, LoRA's number of weights",
}
KINDS = ("trained", "indices", "optimizer", "gradients", "saved", "transient")


def section(result: dict[str, Any]) -> str:
    """Describe `benchmarks/quantized.py`."""
    machine, packed, step = result["machine"], result["packed"], result["step"]
    scales = ", scales in 8 bits" if packed["double_quant"] else ""
    rows = [
        "## Over a base in 4 bits\n",
        f"`python benchmarks/quantized.py`: {result['model']} in {packed['bits']}{scales}, "
        f"{machine['threads']} threads of {machine['processor']}, bitsandbytes' kernels for CPUs. "
        "MiB that live at the peak of a training step, by kind; for SpIEL of the step that moves "
        "deltas as well. Saved is what autograd keeps for backward, transient the rest. What a "
        "kernel takes and gives back within one operation is not seen, which is the same for all: "
        "one unpacked weight. Times are medians of CPU seconds of whole steps over QLoRA's, at "
        f"{step['cell'].replace('x', ' x ')} tokens, SpIEL's between two windows.\n",
    ]
    for cell, found in result["cells"].items():
        base = found["cases"]["qlora"]["frozen"] / 2**20
        rows += [
            f"{cell.replace('x', ' x ')} tokens; the base is {base:.0f} MiB of each peak:\n",
            "| | " + " | ".join(KINDS) + " | peak | to QLoRA | to bfloat16 | time |",
            "|---" * (len(KINDS) + 5) + "|",
            *(
                _row(name, kinds, found["ratio"], step["ratio"] if cell == step["cell"] else {})
                for name, kinds in found["cases"].items()
            ),
            "",
        ]
    return "\n".join(rows)


def _row(name: str, kinds: dict[str, int], ratio: dict[str, Any], time: dict[str, float]) -> str:
    cells = [LABELS[name], *(f"{kinds[kind] / 2**20:.0f}" for kind in KINDS)]
    cells.append(f"{kinds['peak'] / 2**20:.0f}")
    cells += [f"{ratio[peer][name]:.3f}" for peer in ("qlora", "qlora_bf16")]
    return "| " + " | ".join([*cells, f"{time[name]:.2f}" if time else ""]) + " |"
