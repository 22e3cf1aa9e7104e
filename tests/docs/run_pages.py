"""Run the snippets of all pages, in a process of their own: they train, and the hub is a folder."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))


def main(folder: Path, pages: list[str]) -> None:
    """Write result.json: for each page, its first mistake, or nothing."""
    hub, cache = folder / "hub", folder / "cache"
    os.environ |= {"HF_HUB_CACHE": str(hub), "SFT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    from workspace import make_files, make_models

    make_models(hub, cache)
    work = folder / "work"
    work.mkdir()
    os.chdir(work)
    make_files(work)
    (work / "recipes").symlink_to(ROOT / "recipes")
    found = {page: mistake(page) for page in pages}
    (folder / "result.json").write_text(json.dumps(found))


def mistake(page: str) -> str | None:
    """Run a page from top to bottom; return where and why it stops."""
    import transformers
    from snippets import run, snippets
    from transformers import AutoModelForCausalLM
    from workspace import HUB_MODELS

    names = {"__page__": page, "__name__": "__main__", **given()}
    transformers.set_seed(0)
    first = names["base"]
    for snippet in snippets((ROOT / page).read_text(encoding="utf-8")):
        try:
            if names["base"] is first:  # a method may be on the last one
                names["base"] = first = AutoModelForCausalLM.from_pretrained(HUB_MODELS[0])
            run(snippet, names)
        except BaseException:
            return f"{page}:{snippet.line}: {snippet.language}\n{traceback.format_exc(limit=-4)}"
    return None


def given() -> dict[str, object]:
    """Return what pages take for granted: a model, arguments, and rows."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
    from workspace import HUB_MODELS

    tokenizer = AutoTokenizer.from_pretrained(HUB_MODELS[0])
    texts = [f"{a} + {b} = {a + b}" for a in range(5) for b in range(5)]
    rows = Dataset.from_list([{**tokenizer(t), "labels": tokenizer(t)["input_ids"]} for t in texts])
    return {
        "base": AutoModelForCausalLM.from_pretrained(HUB_MODELS[0]),
        "tokenizer": tokenizer,
        "args": TrainingArguments("out", max_steps=2, use_cpu=True, report_to="none"),
        "rows": rows,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
