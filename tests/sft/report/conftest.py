"""Short training runs of a tiny Llama, and a run folder as `sft train` leaves it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def trainer(llama, tmp_path):
    """Build a Trainer with a log; the same bits every time."""

    def build(config: Any = None, *, resume: Any = None, cls: Any = None, **settings: Any) -> Any:
        import torch
        from peft import get_peft_model
        from transformers import PrinterCallback, TrainingArguments

        from sft import SparseTrainer
        from sft.report.log import RunLog

        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 48, (16, 6), generator=draw)
        rows = [{"input_ids": row, "labels": row} for row in ids]
        defaults = {
            "output_dir": str(tmp_path / "run"), "max_steps": 6, "logging_steps": 2,
            "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True,
            "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2,
            "include_num_input_tokens_seen": "all",
        }  # fmt: skip
        model = llama() if config is None else get_peft_model(llama(), config)
        built = (cls or SparseTrainer)(
            model=model,
            args=TrainingArguments(**defaults | settings),
            train_dataset=rows,
            eval_dataset=rows[:4],
            callbacks=[RunLog()],
        )
        built.remove_callback(PrinterCallback)
        return built

    return build


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "run" / "log.jsonl"


@pytest.fixture
def run_folder(tmp_path):
    """Write the folder of a run that has every section, or all but those that are None."""

    def build(name: str = "run", **changes: Any) -> Path:
        return made().write(tmp_path / name, **changes)

    return build


@pytest.fixture
def made_lines() -> list[dict[str, Any]]:
    return made().lines()


def made() -> Any:
    spec = importlib.util.spec_from_file_location("made", Path(__file__).with_name("made.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
