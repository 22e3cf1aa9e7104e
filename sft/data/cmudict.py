"""The embedded data set: English words and their phonemes, from the CMU Pronouncing Dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "builtin" / "cmudict.tsv"


def load_cmudict() -> tuple[Any, Any]:
    """Return the training and the held-out words as prompt + completion data sets.

    The prompt spells the word, letter by letter: `c a t ->` is completed by ` K AE T`. Spelled
    letters are one token each, so a model sees the letters that a word's own token would hide.
    """
    from datasets import Dataset

    rows: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    for line in FILE.read_text(encoding="ascii").splitlines():
        word, phonemes, part = line.split("\t")
        rows[part].append({"prompt": f"{' '.join(word)} ->", "completion": f" {phonemes}"})
    return Dataset.from_list(rows["train"]), Dataset.from_list(rows["held_out"])
