"""Measure a case in a process of its own: peak memory, adapter file, profile of a step."""

from __future__ import annotations

import copy
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from method_cases import CASES, quiet
from profiled import profile
from transformers import AutoModelForCausalLM

HIGH_WATER = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def alone(name: str | None, folder: str, dtype: str, ids: torch.Tensor) -> dict[str, Any]:
    """Return what `_measure` finds in a new process, which has imported everything already."""
    # where the server finds this module, to import it once for all processes
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    job = (theirs, name, folder, dtype, ids.tolist(), torch.get_num_threads())
    process = context.Process(target=_send, args=job)
    process.start()
    theirs.close()  # so that a process that dies ends the waiting
    found: dict[str, Any] = ours.recv()
    process.join()
    return found


def _send(pipe: Connection, *job: Any) -> None:
    pipe.send(_measure(*job))


def _measure(
    name: str | None, folder: str, dtype: str, ids: list[list[int]], threads: int
) -> dict[str, Any]:
    """Train two steps, then profile a third and save; None for a process that only loads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    quiet()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    base = copy.deepcopy(loaded).train()  # out of the mapped file, whose pages come and go
    del loaded
    forget_peak()
    if name is None:
        return {"peak_rss": peak_rss()}
    start = time.process_time()
    case = CASES[name](base)
    attached = time.process_time() - start
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    for _ in range(2):
        case.step(batch)
    found = {"peak_rss": peak_rss(), "attach_cpu_seconds": attached}
    found["profile"] = profile(lambda: case.step(batch))
    found["file_size"] = file_size(case.model) if case.optimizer is not None else 0
    return found


def file_size(model: Any) -> int:
    """Return the bytes of the weights file that a model, or its adapter, is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def forget_peak() -> None:
    """Let `peak_rss` begin anew, where the kernel can."""
    if RESET.exists():
        RESET.write_text("5")


def peak_rss() -> int:
    """Return the most bytes of memory that the process has held at once."""
    if HIGH_WATER.is_file():
        for line in HIGH_WATER.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
