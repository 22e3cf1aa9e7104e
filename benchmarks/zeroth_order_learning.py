"""Compare MeZO and Sparse MeZO on review snippets, each at the best learning rate of a sweep.

`python benchmarks/zeroth_order_learning.py [--sweep] [--archive FILE] [--workers 2] [--out FILE]`

The snippets are VADER's ground truth (Hutto & Gilbert, ICWSM 2014): third parties' text, which
is not ours to pass on. The archive is the source distribution of vadersentiment 3.3.2 on PyPI.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from machine import machine
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback, TrainingArguments

from sft import SparseTrainer, ZerothOrderConfig
from sft.models import load_model, load_tokenizer
from sft.recipe.schema import ModelSpec

MODEL = "smollm2-135m-instruct"
PACKAGE, INNER = "vadersentiment==3.3.2", "additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
PROMPT, ANSWERS = "{} It was", (" terrible", " great")  # that of MeZO's authors for SST-2
TOKENS = (4, 12)  # of a snippet: short ones, so that a run takes minutes on one core
CHOOSING, HELD_OUT = 250, 300  # examples that choose the learning rate, and that judge
METHODS = {"mezo": 0.0, "sparse_mezo": 0.75}  # name -> sparsity
SWEEP = {"mezo": (1e-5, 3e-5, 1e-4), "sparse_mezo": (3e-5, 1e-4, 3e-4)}
SWEEP_SEED, SEEDS = 100, (0, 1, 2)
SMOOTHED = 3  # evaluations in a row whose mean is taken

Example = tuple[list[int], int]  # token ids, and which of ANSWERS is right


@dataclass(frozen=True)
class Job:
    """One run, and the examples that it is measured on."""

    method: str
    learning_rate: float
    seed: int
    updates: int
    every: int
    batch_size: int
    eps: float
    measured: str  # "choosing" or "held_out"
    archive: Path


def source(archive: Path | None) -> Path:
    """Return the archive with the snippets, got from PyPI if none is named."""
    if archive is not None:
        return archive if archive.is_file() else sys.exit(f"--archive: {archive}: no such file")
    folder = Path(tempfile.mkdtemp(prefix="vader-"))
    command = ["download", "--no-binary", ":all:", "--no-deps", "-q", "-d", str(folder), PACKAGE]
    done = subprocess.run([sys.executable, "-m", "pip", *command])
    found = [*folder.glob("*.tar.gz")]
    if done.returncode or not found:
        sys.exit(
            f"--archive: none given, and pip cannot get {PACKAGE}; where there is a network: "
            f"pip download --no-binary :all: --no-deps {PACKAGE}, then --archive its file"
        )
    return found[0]


def snippets(archive: Path) -> list[tuple[str, int]]:
    """Return the snippets that people rated clearly (by 1 or more of 4), and whether they like."""
    with tarfile.open(archive) as outer:
        (name,) = (n for n in outer.getnames() if n.endswith(INNER))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            text = inner.extractfile(FILE).read().decode("utf-8", errors="replace")
    rows = [line.split("\t") for line in text.splitlines()]
    return [(row[2].strip(), int(float(row[1]) > 0)) for row in rows if abs(float(row[1])) >= 1]


def split(archive: Path, tokenizer: Any) -> dict[str, list[Example]]:
    """Encode the short snippets and share them out, in the same way for every run."""
    found = []
    for text, label in snippets(archive):
        if TOKENS[0] <= len(tokenizer(text)["input_ids"]) <= TOKENS[1]:
            found.append((tokenizer(PROMPT.format(text))["input_ids"], label))
    random.Random(0).shuffle(found)
    judged = CHOOSING + HELD_OUT
    parts = {"choosing": found[:CHOOSING], "held_out": found[CHOOSING:judged]}
    return parts | {"train": found[judged:]}


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """Pad on the left, so that every prompt ends in the last column."""
    width = max(len(ids) for ids, _ in examples)
    gaps = [width - len(ids) for ids, _ in examples]
    ids = [[pad] * gap + ids for gap, (ids, _) in zip(gaps, examples, strict=True)]
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": mask,
        "position_ids": positions,
        "answer": torch.tensor([label for _, label in examples]),
    }


class Choice:
    """Cross-entropy between the two answers' next-token logits: classification by prompt."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokens = [tokenizer(answer)["input_ids"][0] for answer in ANSWERS]

    def logits(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the answers' logits (batch, 2), and which of them is right."""
        rest = {key: value for key, value in inputs.items() if key != "answer"}
        logits = model(**rest, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits[:, self.tokens].float(), inputs["answer"]

    def __call__(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss that is trained."""
        return functional.cross_entropy(*self.logits(model, inputs))

    @torch.no_grad()
    def measure(self, model: Any, examples: list[Example], pad: int) -> dict[str, float]:
        """Return mean negative log-likelihood and accuracy."""
        examples = sorted(examples, key=lambda example: len(example[0]))
        nll = right = 0.0
        for start in range(0, len(examples), 50):
            logits, answer = self.logits(model, collate(examples[start : start + 50], pad))
            nll += functional.cross_entropy(logits, answer, reduction="sum").item()
            right += (logits.argmax(1) == answer).sum().item()
        return {"nll": nll / len(examples), "accuracy": right / len(examples)}


class Watch(TrainerCallback):
    """Measures every few updates."""

    def __init__(self, every: int, measure: Any) -> None:
        self.every, self.measure = every, measure
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the untrained model."""
        self._note(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if it is time to."""
        if state.global_step % self.every == 0:
            self._note(state)

    def _note(self, state: Any) -> None:
        self.curve.append({"update": state.global_step, **self.measure()})


def run(job: Job) -> dict[str, Any]:
    """Train once through SparseTrainer, in this process."""
    torch.set_num_threads(1)
    started = time.process_time()
    spec = ModelSpec(name=MODEL, dtype="float32")
    tokenizer, model = load_tokenizer(spec), load_model(spec)
    parts, pad, choice = split(job.archive, tokenizer), tokenizer.pad_token_id, Choice(tokenizer)
    watch = Watch(job.every, lambda: choice.measure(model, parts[job.measured], pad))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SparseTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch, max_steps=job.updates, learning_rate=job.learning_rate,
                per_device_train_batch_size=job.batch_size, lr_scheduler_type="constant",
                seed=job.seed, remove_unused_columns=False, logging_strategy="no",
                save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
            ),
            train_dataset=parts["train"],
            data_collator=lambda examples: collate(examples, pad),
            callbacks=[watch],
            zeroth_order=ZerothOrderConfig(
                eps=job.eps, sparsity=METHODS[job.method], objective=choice
            ),
        )  # fmt: skip
        failure = None
        try:
            trainer.train()
        except ValueError as error:  # the guard's: too high a learning rate is a result as well
            failure = str(error)
    last = failure or watch.curve[-1]
    print(f"{job.method} lr {job.learning_rate:g} seed {job.seed}: {last}", flush=True)
    seconds = time.process_time() - started
    return described(job) | {
        "trained_on": len(parts["train"]), "measured_on": len(parts[job.measured]),
        "curve": watch.curve, "failure": failure, "cpu_seconds": seconds,
    }  # fmt: skip


def smoothed(curve: list[dict[str, float]], key: str) -> list[tuple[int, float]]:
    """Return (update, mean of the evaluations up to it) for every full window."""
    windows = [curve[i - SMOOTHED : i] for i in range(SMOOTHED, len(curve) + 1)]
    return [(int(w[-1]["update"]), fmean(row[key] for row in w)) for w in windows]


def reached(curve: list[dict[str, float]], key: str, target: float) -> int | None:
    """Return the first update whose smoothed metric is at least as good as the target."""
    sign = 1 if key == "accuracy" else -1
    fits = (u for u, value in smoothed(curve, key) if sign * value >= sign * target)
    return next(fits, None)


def compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Say when the mean curve of each method reaches the end of MeZO's, and where it ends."""
    found: dict[str, Any] = {}
    curves = {m: mean_curve([r["curve"] for r in runs if r["method"] == m]) for m in METHODS}
    for key in ("accuracy", "nll"):
        target = smoothed(curves["mezo"], key)[-1][1]
        updates = {m: reached(curve, key, target) for m, curve in curves.items()}
        seeds: dict[str, list[float]] = {m: [] for m in METHODS}
        for each in runs:
            seeds[each["method"]].append(smoothed(each["curve"], key)[-1][1])
        found[key] = {
            "target": target,
            "end_by_seed": seeds,
            "end": {m: smoothed(curve, key)[-1][1] for m, curve in curves.items()},
            "updates": updates,
            "ratio": updates["mezo"] / updates["sparse_mezo"] if updates["sparse_mezo"] else None,
        }
    return found


def mean_curve(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Return the mean over runs, evaluation by evaluation."""
    rows = zip(*curves, strict=True)
    return [{key: fmean(row[key] for row in same) for key in same[0]} for same in rows]


def best(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return for each method the learning rate with the lowest smoothed NLL at its end."""
    ends = {
        (r["method"], r["learning_rate"]): smoothed(r["curve"], "nll")[-1][1]
        for r in runs
        if not r["failure"]
    }
    return {
        method: min((end, rate) for (m, rate), end in ends.items() if m == method)[1]
        for method in METHODS
    }


def jobs(args: argparse.Namespace, rates: dict[str, float] | None) -> list[Job]:
    """Return the runs of the sweep, or at the rates that it chose."""
    common = (args.every, args.batch_size, args.eps)
    if rates is None:
        chosen = [(m, rate, SWEEP_SEED) for m in METHODS for rate in SWEEP[m]]
        return [Job(*c, args.sweep_updates, *common, "choosing", args.archive) for c in chosen]
    chosen = [(m, rates[m], seed) for seed in SEEDS for m in METHODS]
    return [Job(*c, args.updates, *common, "held_out", args.archive) for c in chosen]


def completed(
    wanted: list[Job], known: list[dict[str, Any]], workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield all runs so far after each one; what an earlier call has run is not run again."""
    settings = [described(job) for job in wanted]
    found = {i: r for i, job in enumerate(settings) for r in known if job.items() <= r.items()}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run, job): i for i, job in enumerate(wanted) if i not in found}
        yield [found[i] for i in sorted(found)]
        for future in as_completed(running):
            found[running[future]] = future.result()
            yield [found[i] for i in sorted(found)]


def described(job: Job) -> dict[str, Any]:
    """Return what decides a run."""
    return {key: value for key, value in asdict(job).items() if key != "archive"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = Path(__file__).parent / "results/zeroth_order_learning.json"
    parser.add_argument("--sweep", action="store_true", help="sweep the learning rates, then stop")
    parser.add_argument("--archive", type=Path, help=f"source distribution of {PACKAGE}")
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--sweep-updates", type=int, default=60)
    parser.add_argument("--every", type=int, default=15, help="updates between two evaluations")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    args.archive = source(args.archive)
    torch.set_num_threads(1)  # as in every run
    result = json.loads(args.out.read_text()) if args.out.is_file() else {"sweep": {}}
    if not args.sweep and "best" not in result["sweep"]:
        sys.exit(f"{args.out}: holds no sweep; run with --sweep first")
    part = result["sweep"] if args.sweep else result
    wanted = jobs(args, None if args.sweep else result["sweep"]["best"])
    for runs in completed(wanted, part.get("runs", []), args.workers):
        part["runs"], result["machine"] = runs, machine()
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    part |= {"best": best(part["runs"])} if args.sweep else {"compared": compared(part["runs"])}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
