"""The section on kept inputs of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any


def section(result: dict[str, Any]) -> str:
    """Describe `benchmarks/saved_inputs.py`."""
    machine, saved, gradient = result["machine"], result["saved_mib"], result["gradient"]
    batch = gradient["from batch to batch"]
    rows = [
        "## Inputs kept for backward in fewer bits\n",
        f"`python benchmarks/saved_inputs.py`: {result['model']}, fp32, {machine['threads']} "
        f"threads of {machine['processor']}. Kept is what autograd holds between forward and "
        f"backward of {' x '.join(map(str, result['tokens']))} tokens with SpIEL at 0.5 %; PEFT "
        f"LoRA r=16 holds {saved['lora']:.0f} MiB. The error is of a layer's gradient in the "
        "quickstart, |g' - g| / |g|, median and largest of all layers: of one draw, and of a mean "
        "of draws, which falls as rounding without bias does. From one batch to the next the "
        f"gradient itself changes by {batch['median']:.2f} in the same measure. Then whole runs on "
        "the quickstart's words, 1 % of all linear layers, one figure a seed.\n",
        "| `saved_inputs` | kept | to LoRA | error | of a mean | phoneme error rate | nll |",
        "|---" * 7 + "|",
    ]
    for form in (name for name in saved if name != "lora"):
        runs = result["runs"].get(form, {})
        cells = [f"`{form}`", f"{saved[form]:.0f} MiB", f"{saved[form] / saved['lora']:.2f}"]
        if form in gradient:
            shown = [v for name, v in gradient[form].items() if name != "by layer"]
            cells += [f"{found['median']:.2%} ({found['largest']:.1%})" for found in shown]
        else:
            cells += ["", ""]
        for key in ("token_error_rate", "nll"):
            cells.append(", ".join(f"{after[key]:.3f}" for after in runs.values()))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([*rows, ""])
