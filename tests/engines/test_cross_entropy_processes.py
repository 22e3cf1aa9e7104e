"""Two processes' gradients of the loss in chunks are those of one process on both batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("loss_run.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("loss") / "found.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(SCRIPT), str(out),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", ["ddp", "fsdp-root", "fsdp-head"])
def test_gradients_are_those_of_one_process(found, kind) -> None:
    assert found[kind] < 1e-6


def test_a_trainer_in_chunks_ends_where_one_on_whole_logits_does(found) -> None:
    """The mean is over the labels of all ranks, by each of which the gradients are divided."""
    seen = found["trainer"]
    assert seen["processes"] == 2
    whole, chunked = seen["losses"]
    assert len(whole) == 2 and chunked == pytest.approx(whole, abs=1e-4)  # shown in 4 digits
    assert seen["apart"] < 1e-5 < 1e-2 < seen["moved"]
