"""The processes of one run: how they are started, which comes first, how they end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sft.errors import UserError

USER_ERROR = 2  # exit code
PATIENCE = 5.0  # seconds in which the first process meets an error that all of them meet


def rank() -> int:
    """Return the number of this process in its run, 0 for the first or only one."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def count() -> int:
    """Return how many processes torchrun started for this run."""
    started = os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    return int(os.environ["WORLD_SIZE"]) if started else 1


def say(error: UserError) -> None:
    """Print the user's error once, whichever of the processes meet it.

    The first one prints it. Another one gives it the time to: when a process ends, torchrun ends
    the others.
    """
    if rank() == 0:
        print(f"sft: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(PATIENCE)
    print(f"sft: process {rank()}: {error}", file=sys.stderr, flush=True)


class Team:
    """The processes of a run, in touch with one another.

    Args:
        cpu: they compute on the CPU.
    """

    def __init__(self, *, cpu: bool) -> None:
        self._state: Any = None
        if count() > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=cpu)

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return rank() == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    @contextmanager
    def first_on_each_machine_first(self) -> Iterator[None]:
        """Let one process of a machine go through the block before the others, to fill caches."""
        if self._state is None:
            yield
            return
        with self._state.local_main_process_first():
            yield

    def leave(self) -> None:
        """End the connections, all processes at once; each goes on alone, or ends.

        Together: to end them takes all, as torch has it, and no rank may still be listened to.
        """
        if self._state is not None:
            self._state.wait_for_everyone()
            self._state.destroy_process_group()
            self._state = None


def check_in_touch(args: Any) -> None:
    """Raise if processes that were started together would train a model each.

    Args:
        args: TrainingArguments.

    Raises:
        ValueError: they do not find one another: on the CPU, accelerate wants to be told.
    """
    if count() > 1 and args.world_size == 1:
        raise ValueError(
            f"use_cpu: got {args.use_cpu} in one of {count()} processes without an accelerator, "
            "each of which would train a model of its own; set use_cpu=True"
        )


def start(number: int, arguments: Sequence[str]) -> None:
    """Run `sft` in so many processes on this machine, by torchrun's launcher.

    Args:
        number: of processes.
        arguments: of the command line.

    Raises:
        UserError: one of them was killed or failed; torchrun has ended the others.
        SystemExit: they refused the user's input, and said so, or the run was stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,
        monitor_interval=0.3,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "sft", *arguments)
    except SignalException as stopped:  # it has ended the processes
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as error:
        failed, failure = error.get_first_failure()
        if failure.exitcode == USER_ERROR:
            raise SystemExit(USER_ERROR) from None
        raise UserError(_ended(failed, failure.exitcode)) from None


def _ended(number: int, code: int) -> str:
    """Say how a process ended, and how the run goes on."""
    resume = "resume the last checkpoint with training.resume_from_checkpoint=auto"
    if code < 0:
        name = signal.Signals(-code).name
        return f"process {number} was ended by {name}, the others were stopped; {resume}"
    return f"process {number} failed (exit code {code}), the others were stopped; {resume}"
