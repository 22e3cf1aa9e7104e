"""The loss in chunks against whole logits, and training with the base in memory against on disk.

`python benchmarks/memory.py [--rounds 3] [--steps 4] [--out FILE]`

The losses run in one process, interleaved, on the quickstart's shapes: eight rows of 32 tokens with
labels, the width and the vocabulary of SmolLM2-135M, a head that is not trained; and on four times
as many labels, where torch's own loss, slow on a CPU, is left out. Bytes are those of forward and
backward; torch's loss is one operation, which takes and gives back its memory unseen. The runs have
a process each, for anonymous memory is a process's: its peak is sampled from the start of training
to its end, and beside it stands that of a model with next to no weights, which is the interpreter,
torch and the Trainer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from allocations import peak_and_largest_bytes
from machine import machine
from method_cases import quiet
from rounds import interleave, medians, ratios
from torch import Tensor, nn

RESULT = Path(__file__).parent / "results/memory.json"
WIDTH, VOCABULARY = 576, 49_152
CASES = {  # what has a process of its own: where the base lies, are blocks recomputed
    "nothing": ("memory", False),
    "memory": ("memory", False),
    "disk": ("disk", False),
    "memory_checkpointed": ("memory", True),
    "disk_checkpointed": ("disk", True),
}
LAYERS, HIDDEN, WORDS, BATCH, LENGTH = 16, 512, 2048, 2, 32
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss from whole logits."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")


def chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss in chunks."""
    from sft.kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, None, targets)


def torchs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss by torch's own operation, with the options that make it go in chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, targets, reduction="sum", options=options)


LOSSES: dict[str, Loss] = {"whole": whole, "chunked": chunked, "torch": torchs}
SEEN = ("whole", "chunked")  # by the counter of allocations
LABELS = {256: tuple(LOSSES), 1024: SEEN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--case", choices=CASES, help="train this one here, and print its figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet()
    if args.case:
        print(json.dumps(trained(args.case, args.steps)))
        return
    runs = {}
    for name in CASES:
        runs[name] = in_a_process(name, args.steps, args.threads)
        print(name, runs[name], flush=True)
    loss = {str(labels): losses(labels, args.rounds) for labels in LABELS}
    shape = {"width": WIDTH, "vocabulary": VOCABULARY}
    result = {"machine": machine(), "loss": shape | {"labels": loss}, "offload": offload(runs)}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(loss), f"written to {args.out}")


def losses(labels: int, rounds: int) -> dict[str, Any]:
    """Return the CPU time of each loss with its gradient, and the bytes it takes."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(labels, WIDTH, generator=draw).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw) * 0.02
    targets = torch.randint(0, VOCABULARY, (labels,), generator=draw)

    def gradient(loss: Loss) -> Tensor:
        return torch.autograd.grad(loss(x, weight, targets), x)[0]

    def seconds(loss: Loss) -> float:
        before = time.process_time()
        gradient(loss)
        return time.process_time() - before

    steps = {name: partial(seconds, LOSSES[name]) for name in LABELS[labels]}
    counted = {n: peak_and_largest_bytes(partial(gradient, LOSSES[n])) for n in SEEN}  # warms up
    times = interleave(steps, rounds, warm_up=False)
    return {
        "peak_bytes": {name: peak for name, (peak, _) in counted.items()},
        "largest_bytes": {name: largest for name, (_, largest) in counted.items()},
        "cpu_seconds": {name: [round(s, 3) for s in found] for name, found in times.items()},
        "ratio": ratios(medians(times), to="whole"),
    }


def in_a_process(case: str, steps: int, threads: int) -> dict[str, Any]:
    """Return what a case took in a process of its own."""
    command = [sys.executable, __file__, "--case", case]
    command += ["--steps", str(steps), "--threads", str(threads)]
    # a malloc that is told to keep what is given back would hide what goes
    environment = {key: v for key, v in os.environ.items() if not key.startswith("MALLOC_")}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def trained(case: str, steps: int) -> dict[str, Any]:
    """Train a case here; return its bytes, and the CPU seconds of all steps but the first."""
    from transformers import TrainerCallback, TrainingArguments

    import sft

    class Clock(TrainerCallback):
        """CPU time at each step's start and end, all threads together."""

        def __init__(self) -> None:
            self.began: list[float] = []
            self.ended: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began.append(time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ended.append(time.process_time())

    where, checkpointed = CASES[case]
    model, clock = llama(tiny=case == "nothing"), Clock()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, max_steps=steps, per_device_train_batch_size=BATCH,
            report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no",
            activation_checkpointing=checkpointed,
        )  # fmt: skip
        trainer = sft.SparseTrainer(
            model=model, args=arguments, train_dataset=words(steps), callbacks=[clock],
            offload=sft.OffloadConfig(base="disk") if where == "disk" else None,
        )  # fmt: skip
        with sampled() as anonymous:
            trainer.train()
    taken = [end - start for start, end in zip(clock.began, clock.ended, strict=True)][1:]
    return {
        "weight_bytes": size,
        "peak_anonymous_bytes": max(anonymous),
        "cpu_seconds": [round(seconds, 3) for seconds in taken],
    }


def llama(*, tiny: bool) -> nn.Module:
    """Return a Llama with an adapter; weights are filled where they lie."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import sft

    hidden, layers, words = (32, 1, 64) if tiny else (HIDDEN, LAYERS, WORDS)
    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    adapter = sft.SpielConfig(
        density=0.005, selection="random", growth="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapter)


def words(steps: int) -> Any:
    """Return a data set of random tokens, which both vocabularies know."""
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (steps * BATCH, LENGTH), generator=draw).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Record the anonymous bytes of this process while the block runs."""
    found, stop = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            found.append(anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def anonymous_bytes() -> int:
    """Return the resident bytes of this process that are of no file."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def offload(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the runs, and their steps over those with the base in memory."""
    seconds = {name: statistics.median(run["cpu_seconds"]) for name, run in runs.items()}
    return {
        "model": {"layers": LAYERS, "width": HIDDEN, "vocabulary": WORDS},
        "batch": [BATCH, LENGTH],
        "runs": runs,
        "ratio": ratios(seconds, to="memory"),
    }


if __name__ == "__main__":
    main()
