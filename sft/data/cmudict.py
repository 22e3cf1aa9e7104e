"""The embedded data sets: English words and their phonemes, from the CMU Pronouncing Dictionary.

One file, several tasks to learn from it; which words are held out is fixed in the file.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "builtin" / "cmudict.tsv"
VOWELS = "AEIOU"  # what the phonemes of a syllable's core begin with
MOST_SYLLABLES = 3


def load_embedded(name: str) -> tuple[Any, Any]:
    """Return the training and the held-out words of an embedded data set.

    Args:
        name: of `EMBEDDED`.
    """
    from datasets import Dataset

    make = EMBEDDED[name]
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
    for line in FILE.read_text(encoding="ascii").splitlines():
        word, phonemes, part = line.split("\t")
        rows[part].append(make(word, phonemes))
    return Dataset.from_list(rows["train"]), Dataset.from_list(rows["held_out"])


def completions(word: str, phonemes: str) -> dict[str, Any]:
    """Spell the word, letter by letter: `c a t ->` is completed by ` K AE T`.

    Spelled letters are one token each, so a model sees the letters that a word's own token hides.
    """
    return {"prompt": f"{' '.join(word)} ->", "completion": f" {phonemes}"}


def chats(word: str, phonemes: str) -> dict[str, Any]:
    """Ask for the phonemes of a word, and answer."""
    question = f"Pronounce: {' '.join(word)}"
    roles = ("user", question), ("assistant", phonemes)
    return {"messages": [{"role": role, "content": text} for role, text in roles]}


def syllables(word: str, phonemes: str) -> dict[str, Any]:
    """Spell the word, to be classified by the number of its syllables, 3 standing for more."""
    count = sum(phoneme[0] in VOWELS for phoneme in phonemes.split())
    return {"text": " ".join(word), "label": str(min(count, MOST_SYLLABLES))}


def preferences(word: str, phonemes: str) -> dict[str, Any]:
    """Prefer the phonemes of a word to the same ones in another order, or too few of them."""
    right = phonemes.split()
    wrong = random.Random(word).sample(right, len(right))
    if wrong == right:
        wrong = right[:-1]
    prompt = completions(word, phonemes)["prompt"]
    return {"prompt": prompt, "chosen": f" {phonemes}", "rejected": f" {' '.join(wrong)}"}


def words_to_score(word: str, phonemes: str) -> dict[str, Any]:
    """Spell the word; what it should be completed by goes to the reward functions alone."""
    return {"prompt": f"{' '.join(word)} ->", "answer": phonemes}


EMBEDDED: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "cmudict": completions,
    "cmudict-chat": chats,
    "cmudict-syllables": syllables,
    "cmudict-preferences": preferences,
    "cmudict-prompts": words_to_score,
}
