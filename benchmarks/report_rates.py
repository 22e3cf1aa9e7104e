"""The table of learning rates: what each case learns, and what it forgets."""

from __future__ import annotations

from itertools import groupby
from typing import Any

ALLOWED = 0.5  # nats that the loss on general text may rise


def section(result: dict[str, Any]) -> str:
    """Describe `benchmarks/rates.py`."""
    runs = result["runs"]
    first, text = runs[0], runs[0]["forgetting"]
    rows = [
        "## Learning rates: what is learnt, and what is forgotten\n",
        f"`python benchmarks/rates.py`: the quickstart's words, {first['steps']} updates of each "
        f"method at several rates. Phoneme error rate on held-out words ("
        f"{first['before']['token_error_rate']:.2f} before), and loss on {text['tokens']:,} tokens "
        f"of general text ({text['loss_before']:.2f} before). Bold is the lowest error rate of "
        f"those that raise that loss by less than {ALLOWED} nats: the recipes take rates near "
        "these.\n",
        "| | trained | learning rate | phoneme error rate | exact match | loss on general text "
        "| KL from the base |",
        "|---" * 7 + "|",
    ]
    for case, found in groupby(runs, key=lambda run: run["case"]):
        own = list(found)
        best = min(filter(keeps, own), key=error, default=None)
        rows += [_row(case, run, bold=run is best) for run in own]
    return "\n".join([*rows, ""])


def keeps(run: dict[str, Any]) -> bool:
    """Tell whether a run forgets little."""
    found = run["forgetting"]
    return bool(found["loss_after"] - found["loss_before"] < ALLOWED)


def error(run: dict[str, Any]) -> float:
    """Return a run's error rate."""
    return float(run["after"]["token_error_rate"])


def _row(case: str, run: dict[str, Any], *, bold: bool) -> str:
    after, found = run["after"], run["forgetting"]
    rate = f"{error(run):.2f}"
    share = f"{run['trained_weights'] / run['all_weights']:.2%}"
    cells = [
        case, share, f"{run['learning_rate']:g}", f"**{rate}**" if bold else rate,
        f"{after['exact_match']:.2f}", f"{found['loss_after']:.2f}", f"{found['kl']:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
