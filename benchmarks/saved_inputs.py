"""Inputs kept for backward in fewer bits: bytes, error of the gradient, and of the quickstart.

`python benchmarks/saved_inputs.py [--seeds N ...] [--out FILE]`
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import machine
from method_cases import lora, quiet, spiel_sparse
from peft import get_peft_model
from saved import saved_bytes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from sft.adapters.layer import sparse_layers
from sft.adapters.resident import enter_resident
from sft.data.load import load_data
from sft.embedded import folder_of
from sft.kernels.kept import FORMS
from sft.recipe.load import load_recipe
from sft.run.job import train_from_recipe

MODEL = "smollm2-135m-instruct"
RECIPE = Path(__file__).parent.parent / "recipes/quickstart.yaml"
LOSSY = [form for form in FORMS if form != "full"]
Batch = dict[str, Tensor]


def kept(base: nn.Module, tokens: tuple[int, int]) -> dict[str, float]:
    """Return the MiB kept for backward: LoRA r=16's, and SpIEL's at 0.5 % in each form."""
    ids = torch.randint(0, base.config.vocab_size, tokens)  # type: ignore[union-attr]
    batch, found = {"input_ids": ids, "labels": ids}, {}
    for name in ("lora", *FORMS):
        model = (lora if name == "lora" else spiel_sparse)(copy.deepcopy(base).train()).model
        for layer in sparse_layers(model).values():
            layer.site("default").saved_inputs = name  # type: ignore[operator]
        held = [*model.parameters(), *model.buffers()]
        found[name] = round(sum(saved_bytes(model, batch, held).values()) / 2**20, 1)
    return found


def gradients(base: nn.Module, batches: list[Batch], draws: int) -> dict[str, Any]:
    """Return relative errors of each layer's gradient, by form, and what they compare with."""
    config = sft.SpielConfig(density=0.01, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(base).train(), config)
    enter_resident(model)
    exact = _gradient(model, batches[0], "full")
    other = _gradient(model, batches[1], "full")
    found: dict[str, Any] = {"from batch to batch": _summary(_errors(other, exact))}
    for form in LOSSY:
        seen = [_gradient(model, batches[0], form) for _ in range(draws)]
        mean = {name: sum(each[name] for each in seen) / draws for name in exact}
        found[form] = {
            "draw": _summary(_errors(seen[0], exact)),
            f"mean of {draws}": _summary(_errors(mean, exact)),  # type: ignore[arg-type]
            "by layer": {n: round(v, 5) for n, v in _errors(seen[0], exact).items()},
        }
    return found


def _gradient(model: nn.Module, batch: Batch, form: str) -> dict[str, Tensor]:
    layers = sparse_layers(model)
    for layer in layers.values():
        layer.site("default").saved_inputs = form  # type: ignore[operator]
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: layer.trained_values["default"].grad.clone() for n, layer in layers.items()}


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {n: ((found[n] - g).norm() / g.norm()).item() for n, g in exact.items()}


def _summary(errors: dict[str, float]) -> dict[str, float]:
    values = errors.values()
    shown = {"median": statistics.median(values), "largest": max(values)}
    return {name: round(value, 5) for name, value in shown.items()}


def batches_of(count: int, size: int) -> list[Batch]:
    """Return batches of the quickstart's training words, padded to their longest."""
    tokenizer = AutoTokenizer.from_pretrained(folder_of(MODEL))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_data(load_recipe(str(RECIPE)).data, 0).train.select(range(count * size))
    texts = [row["prompt"] + row["completion"] for row in rows]
    made = []
    for start in range(0, len(texts), size):
        batch = tokenizer(texts[start : start + size], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        made.append({**batch, "labels": labels})
    return made


def run(form: str, seed: int) -> dict[str, float]:
    """Train 1 % of all linear layers on the quickstart's words; return metrics on held-out ones."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = [
            f"training.output_dir={scratch}/run",
            f"method.saved_inputs={form}",
            "method.target_modules=all-linear",  # whose inputs are all kept
            "method.density=0.01",
            "method.selection=random",
            "training.learning_rate=2.5e-3",
            f"seed={seed}",
            "export.merged=false",
            "export.verify=false",
        ]
        return dict(train_from_recipe(load_recipe(str(RECIPE), settings)).after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(__file__).parent / "results/saved_inputs.json"
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="that run")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder_of(MODEL), dtype=torch.float32)
    result: dict[str, Any] = {"machine": machine(), "model": MODEL, "tokens": [4, 128]}
    result["saved_mib"] = kept(base, (4, 128))
    result["gradient"] = gradients(base, batches_of(2, 8), args.draws)
    del base
    result["runs"] = {form: {} for form in args.forms}
    for seed in args.seeds:
        for form in args.forms:
            result["runs"][form][str(seed)] = run(form, seed)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
