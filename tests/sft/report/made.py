"""A run folder made by hand: every section that a run can have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def modules(layers: int = 2) -> list[str]:
    return [f"model.layers.{i}.{kind}" for i in range(layers) for kind in KINDS]


def lines() -> list[dict[str, Any]]:
    """Nine updates of training, two evaluations, two reselections, ranks that fall."""
    found: list[dict[str, Any]] = [{"step": 0, "seconds": 0.0, "event": "began"}]
    for step in range(1, 10):
        line = {"step": step, "seconds": 2.0 * step, "tokens": 100 * step, "loss": 4.0 / step}
        line |= {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 50.0 + step}
        found.append(line | {"peak_memory": 2**30, "epoch": 0.1, "rewards/mean": 0.5})
        if step in (4, 8):
            found.append({"step": step, "eval_loss": 3.0 / step, "eval_exact_match": step / 10})
            moved = {name: 10 * i for i, name in enumerate(modules())}
            event = {"event": "reselected", "moved": 150, "kept": 450, "modules": moved}
            found.append({"step": step, **event})
        if step in (3, 6):
            ranks = {name: 12 - step + i for i, name in enumerate(modules())}
            found.append({"step": step, "event": "ranks", "ranks": ranks})
    return [*found, {"step": 9, "event": "ended", "train_loss": 1.0}]


def support() -> dict[str, Any]:
    rows = {
        name: {"shape": [10, 100], "weights": 1000, "trained": 100, "reached": 100,
               "density": 0.1 + 0.01 * i, "delta_norm": 1.0 + i, "delta_max": 0.5}
        for i, name in enumerate(modules())
    }  # fmt: skip
    group = {"modules": 2, "trained": 200, "density": 0.1, "delta_norm": 2.0, "delta_max": 0.5}
    types = {kind.partition(".")[2]: group for kind in KINDS}
    layers = {"0": group, "1": group}
    return {"modules": rows, "types": types, "layers": layers, "support_hash": "ab" * 32}


def record() -> dict[str, Any]:
    data = {
        "format": "prompt_completion", "train": 3600, "held_out": 400,
        "sources": [{"path": "rows.jsonl", "rows": 3600, "weight": 1.0}],
        "dropped": 2, "skipped_rows": 61,
        "skipped": [{"file": "rows.jsonl", "line": 7, "reason": "completion: got null"}],
        "tokens": {"mean": 17.4, "p50": 17, "p95": 24, "max": 38},
        "preview": {"text": "", "segments": [["a <b> ->", False], [" A B", True]], "label": "noun"},
    }  # fmt: skip
    forgetting = {
        "text": "general", "tokens": 1022, "loss_before": 2.5, "loss_after": 2.7,
        "perplexity_before": 12.2, "perplexity_after": 14.9, "kl": 0.12, "threshold": 0.1,
        "alert": True,
    }  # fmt: skip
    sample = {"prompt": "m o ->", "reference": "M OW", "before": "<script>x", "after": "M AO"}
    return {
        "before": {"exact_match": 0.05, "loss": 9.0}, "after": {"exact_match": 0.8125},
        "also": {"choices_accuracy": [0.25, 0.375]},
        "trained_weights": 1_061_683, "all_weights": 134_515_008, "steps": 9, "train_loss": 1.0,
        "max_logit_difference": 0.0, "seconds": {"model": 1.5, "train": 59.0, "export": 4.7},
        "data": data, "forgetting": forgetting, "samples": [sample], "support": support(),
        "versions": {"torch": "2.9"},
        "recipe": {"model": {"name": "tiny"}, "method": {"name": "spiel"}, "task": "sft"},
    }  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    """Write a run's folder; a section that is None is left out."""
    folder.mkdir(exist_ok=True)
    content = {key: value for key, value in (record() | changes).items() if value is not None}
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "recipe.yaml").write_text("model:\n  name: tiny  # <base>\n")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    return folder
