"""A result in the layout of PEFT's method comparison, whose own tools then read our folder.

`run_info`, `train_info` and `meta_info` hold the keys that its `processing.py` asks for. Ours go
beside them: `train_info.step` and `train_info.bytes`. There is no accelerator, so the memory keys
hold what a training step needs at its peak: all that the model, the method and the optimizer hold
and all that lives at once in a step. Accuracy is not measured here.
"""

from __future__ import annotations

import platform
from datetime import datetime
from statistics import median
from typing import Any

from machine import PACKAGES, machine
from peft import PeftConfig

from sft import __version__


def record(
    *,
    experiment: str,
    created: datetime,
    model_id: str,
    total_seconds: float,
    train_config: dict[str, Any],
    adapter: PeftConfig | None,
    counts: dict[str, int],
    loss: float,
    times: list[dict[str, float]],
    held: dict[str, int],
    saved: dict[str, int],
    peak: int,
    alone: dict[str, Any],
) -> dict[str, Any]:
    """Return one case in one cell.

    Args:
        experiment: "method/details".
        created: one time for all records of a run.
        model_id: of the base model.
        total_seconds: of the cell.
        train_config: dtype, batch and length among others.
        adapter: None where there is no adapter.
        counts: "num_trainable_params" and "num_total_params".
        loss: of the last step.
        times: CPU seconds by part and wall seconds, one for each step.
        held: bytes by kind between steps.
        saved: bytes kept for backward by module class.
        peak: bytes that live at once in a step beyond those held.
        alone: measured in a process of its own, or empty.
    """
    wall = sum(step["wall"] for step in times)
    memory = sum(held.values()) - held["gradients"] + peak
    samples = train_config["batch_size"] * len(times)
    here = machine()
    return {
        "run_info": {
            "created_at": created.isoformat(timespec="seconds"),
            "total_time": round(total_seconds, 2),
            "experiment_name": experiment,
            "peft_branch": "release",
            "train_config": {"model_id": model_id, **train_config},
            "peft_config": None if adapter is None else _adapter(adapter, model_id),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": round(wall, 3),
            "file_size": alone.get("file_size", 0),
            **counts,
            "status": "success",
            "metrics": [
                {
                    "step": len(times),
                    "test accuracy": None,
                    "train loss": round(loss, 4),
                    "train samples": samples,
                    "train total tokens": samples * train_config["max_seq_length"],
                }
            ],
            "step": {
                "median_cpu_seconds": {k: round(median(t[k] for t in times), 4) for k in times[0]},
                "cpu_seconds": [{k: round(v, 4) for k, v in step.items()} for step in times],
                "profile_ms": alone.get("profile"),
                "attach_cpu_seconds": alone.get("attach_cpu_seconds"),
            },
            "bytes": {**held, "saved": saved, "peak_of_step": peak}
            | {k: v for k, v in alone.items() if k == "peak_rss_over_base"},
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {"random tokens": {"sha": None, "created_at": None}},
            "package_info": {
                **{f"{name}-version": here["versions"].get(name) for name in PACKAGES},
                "sparse-sft-version": __version__,
                "datasets-version": here["versions"].get("datasets"),
                "bitsandbytes-version": here["versions"].get("bitsandbytes"),
            },
            "system_info": {
                "system": platform.system(),
                "machine": platform.machine(),
                "processor": here["processor"],
                "accelerator": "none",
                "threads": here["threads"],
                "capability": here["capability"],
                "environment": here["environment"],
            },
            "pytorch_info": f"PyTorch {here['versions']['torch']}, Python {here['python']}",
        },
    }


def _adapter(adapter: PeftConfig, model_id: str) -> dict[str, Any]:
    # the model may be a folder of this machine
    return _plain(adapter.to_dict()) | {"base_model_name_or_path": model_id}


def _plain(value: Any) -> Any:
    """Return a value that JSON knows: sets sorted, what is no plain value as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))
