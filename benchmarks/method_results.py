"""Read what `methods.py` wrote, as figures to show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).parent / "results/methods"
MIB = 2**20
PARTS = ("forward", "backward", "optimizer", "selection")
MAIN = "float32-4x128"
CLOSE = f"{MAIN}-close"  # the same with few cases, over many rounds

LABELS = {
    "floor": "frozen floor: forward + input gradients",
    "full": "full fine-tuning",
    "lora": "PEFT LoRA r=16",
    "dora": "PEFT DoRA r=16",
    "shira": "PEFT SHiRA",
    "supertuning": "PEFT Super-Tuning",
    "spiel": "SpIEL",
    "s2ft": "S2FT",
    "sora": "SoRA, 16 ranks",
    "sltrain": "SLTrain beside frozen weights",
    "spiel_sparse": "SpIEL, 0.5 % of the linear layers",
    "spiel_int8": "SpIEL, 0.5 %, inputs kept in int8",
    "s2ft_sparse": "S2FT, 1 % of o and down",
    "spiel_window": "SpIEL, 0.5 %, inside a window",
    "spiel_reselect": "SpIEL, 0.5 %, window of one update and reselection",
    "spiel_aside": "SpIEL, 0.5 %, base untouched",
    "sora_half": "SoRA, 8 of 16 ranks left",
    "sltrain_scratch": "SLTrain from scratch, r=128, density 3 %",
}
PEERS = ("full", "lora", "dora", "shira", "supertuning")


@dataclass(frozen=True)
class Found:
    """One case in one cell."""

    record: dict[str, Any]

    @property
    def step(self) -> dict[str, Any]:
        """Times and profile."""
        found: dict[str, Any] = self.record["train_info"]["step"]
        return found

    @property
    def bytes(self) -> dict[str, Any]:
        """Bytes by kind."""
        found: dict[str, Any] = self.record["train_info"]["bytes"]
        return found

    @property
    def saved(self) -> int:
        """Bytes kept for backward."""
        return sum(self.bytes["saved"].values())

    @property
    def trained(self) -> int:
        """Trained weights."""
        return int(self.record["train_info"]["num_trainable_params"])

    @property
    def file_size(self) -> int:
        """Bytes of the adapter file, or of the model's."""
        return int(self.record["train_info"]["file_size"])

    def totals(self) -> list[float]:
        """Return the CPU seconds of each step."""
        return [sum(step[part] for part in PARTS) for step in self.step["cpu_seconds"]]

    def seconds(self, part: str) -> float:
        """Return the median CPU seconds of a part, or of the wall clock."""
        return float(self.step["median_cpu_seconds"][part])

    def ratio(self, to: Found) -> tuple[float, float, float]:
        """Return median, least and largest of the ratios of steps in one round."""
        both = zip(self.totals(), to.totals(), strict=True)
        ratios = [own / other for own, other in both]
        return median(ratios), min(ratios), max(ratios)


Cell = dict[str, Found]


def read(folder: Path = FOLDER) -> dict[str, Cell]:
    """Return {cell: {case: found}}: float32 first, few tokens first, cases as in `LABELS`."""
    cells: dict[str, Cell] = {}
    for path in sorted(folder.glob("*--*.json")):
        case, _, cell = path.stem.partition("--")
        cells.setdefault(cell, {})[case] = Found(json.loads(path.read_text()))
    ordered = sorted(cells, key=_size)
    return {name: {c: cells[name][c] for c in LABELS if c in cells[name]} for name in ordered}


def _size(cell: str) -> tuple[bool, int, str]:
    dtype, size = cell.split("-")[:2]
    rows, length = map(int, size.split("x"))
    return dtype != "float32", rows * length, cell


def machine(found: Found) -> str:
    """Name threads and processor."""
    system = found.record["meta_info"]["system_info"]
    return f"{system['threads']} threads of {system['processor']}"
