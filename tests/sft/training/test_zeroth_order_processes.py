"""Two processes train without gradients: they exchange a few numbers, and stay bit-identical.

Run as a script, by torchrun, this file is what the processes do; the tests read what they left.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "broadcast",
    "broadcast_object_list", "gather", "reduce", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "data": {"max_steps": 5},
    "queries": {"max_steps": 5, "parallel": "queries", "queries": 2},
    "momentum": {"max_steps": 6, "update": "momentum", "dense_state": True, "save_steps": 3},
}


def build(lab: Any, out: str, batch: int, **settings: Any) -> Any:
    """Make a trainer whose sentences count differently many tokens, in fp64 up to the logits."""
    from sft import SparseTrainer, ZerothOrderConfig

    ours = {k: settings.pop(k) for k in list(settings) if k in ZerothOrderConfig.__annotations__}
    data = lab.dataset().map(lambda row, i: {"labels": masked(row["labels"], i)}, with_indices=True)

    class Watched(SparseTrainer):
        sizes: list[int]
        models: set[str]

        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            self.models.add(type(model).__name__)
            with counted(self.sizes):
                return super().compute_loss(model, *args, **kwargs)

    trainer = lab.trainer(
        out,
        model=lab.base().double(),
        cls=Watched,
        trainer={
            "zeroth_order": ZerothOrderConfig(eps=1e-2, **ours),
            "train_dataset": data,
            "compute_loss_func": token_loss,
        },
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        save_strategy="steps",
        **settings,
    )
    trainer.sizes, trainer.models = [], set()
    return trainer


def masked(ids: list[int], number: int) -> list[int]:
    """Let the first few tokens of a row not count."""
    return [-100] * (number % 5) + ids[number % 5 :]


def token_loss(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return total / num_items_in_batch


@contextmanager
def counted(sizes: list[int]) -> Iterator[None]:
    """Note the bytes that each collective is handed by this process."""
    real = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def noting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            # the last tensor is what is sent; the others take what is received
            sent = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            sizes.append(sent[-1].nbytes if sent else -1)
            return function(*args, **kwargs)

        return call

    for name, function in real.items():
        setattr(torch.distributed, name, noting(function))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(torch.distributed, name, function)


def left_by(trainer: Any) -> dict[str, Any]:
    optimizer = trainer.optimizer.optimizer
    return {
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        "gradients": [row.gradients for row in optimizer.log.rows],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "sizes": trainer.sizes,
        "models": sorted(trainer.models),
        "processes": trainer.args.world_size,
    }


def work(folder: Path) -> None:
    """Do all runs, as one of the processes."""
    from conftest import Lab

    torch.set_num_threads(1)
    lab, found = Lab(folder), {}
    for name, settings in RUNS.items():
        trainer = build(lab, name, 4, **settings)
        if trainer.args.process_index == 1:
            for parameter in trainer.model.parameters():
                parameter.data.add_(1.0)  # as an adapter's random start may differ
        trainer.train()
        found[name] = left_by(trainer)
    resumed = build(lab, "momentum", 4, **RUNS["momentum"])
    resumed.train(lab.checkpoint("momentum", 3))
    found["resumed"] = left_by(resumed)
    torch.save(found, folder / f"rank{resumed.args.process_index}.pt")
    torch.distributed.barrier()  # nobody leaves while another still speaks
    torch.distributed.destroy_process_group()


Left = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Left, Left]:
    """Return the folder of the runs, and what each process left."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    found = subprocess.run(
        [sys.executable, "-m", *launch, "--master_port", port, __file__, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return folder, first, second


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_z12_the_processes_stay_bit_identical(ranks, assert_equal, name) -> None:
    _, first, second = ranks
    assert first[name]["processes"] == second[name]["processes"] == 2
    assert_equal(first[name]["weights"], second[name]["weights"])
    assert first[name]["gradients"] == second[name]["gradients"]
    assert len(first[name]["gradients"]) == RUNS.get(name, RUNS["momentum"])["max_steps"]


def test_z12_half_a_batch_each_is_one_process_with_the_whole(ranks, lab) -> None:
    """Sentences count differently many tokens, so a mean of the halves' means would not do."""
    whole = build(lab, "whole", 8, **RUNS["data"])
    whole.train()
    alone, shared = left_by(whole), ranks[1]["data"]
    assert alone["processes"] == 1
    for one, two in zip(alone["gradients"], shared["gradients"], strict=True):
        assert two == pytest.approx(one, rel=1e-6, abs=1e-6)
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "size"), [("data", 24), ("momentum", 24), ("queries", 40)])
def test_an_update_exchanges_its_losses_and_nothing_else(ranks, name, size) -> None:
    """Two losses and a count of 8 bytes; four losses for two directions."""
    for left in ranks[1:]:
        assert left[name]["sizes"] == [size] * RUNS[name]["max_steps"]


def test_no_process_wraps_the_model(ranks) -> None:
    for left in ranks[1:]:
        assert all(run["models"] == ["LlamaForCausalLM"] for run in left.values())


def test_every_process_has_directions_of_its_own(ranks) -> None:
    rows = ranks[1]["queries"]["gradients"]
    assert all(len(row) == 4 and len(set(row)) == 4 for row in rows)


def test_one_process_replays_the_log_of_two(ranks, lab, assert_equal) -> None:
    from sft.optim.zeroth_order.log import ZerothOrderLog
    from sft.zeroth_order.replay import replay_onto

    folder, first, _ = ranks
    for name in RUNS:
        log = ZerothOrderLog.load(folder / name / "zeroth_order" / "log.safetensors")
        model = lab.base().double()
        replay_onto(model, log)
        assert_equal({n: p.detach() for n, p in model.named_parameters()}, first[name]["weights"])


def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(ranks, assert_equal) -> None:
    for left in ranks[1:]:
        assert_equal(left["resumed"]["weights"], left["momentum"]["weights"])
        assert left["resumed"]["gradients"] == left["momentum"]["gradients"]
        assert len(left["resumed"]["sizes"]) == 3  # half of the updates were made


if __name__ == "__main__":
    work(Path(sys.argv[1]))
