"""FSDP2: two processes end where one process ends on the whole batch, whatever is sharded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

# an adapted embedding is saved with its table
pytestmark = pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
HERE = Path(__file__).parent
QUICK = ["spiel", "spiel-momentum", "s2ft", "sora", "sltrain"]
SLOW = [
    "spiel-accumulated", "spiel-calibrated", "spiel-few", "s2ft-activation", "s2ft-experts",
    "sora-l1", "lora", "packed-spiel", "sharded-spiel", "sharded-spiel-momentum",
    "sharded-spiel-calibrated", "sharded-spiel-embedding", "sharded-s2ft",
    "sharded-s2ft-activation", "sharded-s2ft-gradient", "sharded-sora", "sharded-sltrain",
    "sltrain-scale", "sltrain-pretrain", "full",
]  # fmt: skip
# in whole copies, for what shards are measured by
COPIED = [
    "packed-spiel", "packed-spiel-momentum", "packed-spiel-calibrated", "packed-spiel-embedding",
    "packed-s2ft", "packed-s2ft-activation", "packed-s2ft-gradient", "packed-sora",
    "packed-sltrain",
]  # fmt: skip
# what both processes do beside: the first runs of a list come before it
EXTRA = {
    "quick": ["again", "from-plain", "refused"],
    "slow": ["best", "half", "offloaded", "forward"],
}
EXTRA["slow"] += [f"ddp-{name}" for name in COPIED]
METHODS = [*QUICK, *(pytest.param(name, marks=pytest.mark.engines) for name in SLOW)]
SHARDED = [case for case in METHODS if "packed-spiel" not in getattr(case, "values", ())]


@pytest.fixture(scope="session")
def worker() -> Any:
    """The script that two processes run, as a module."""
    spec = importlib.util.spec_from_file_location("fsdp_run", HERE / "fsdp_run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Runs:
    """The same runs by one process and by two that shard."""

    lab: Any
    trainers: dict[str, Any]
    folder: Path
    ranks: list[dict[str, Any]]

    @property
    def alone(self) -> Path:
        return self.lab.folder

    def losses(self, name: str) -> list[float]:
        history = self.trainers[name].state.log_history
        return [row["loss"] for row in history if "loss" in row]


def train_alone(worker, folder: Path, names: list[str]) -> tuple[Any, dict[str, Any]]:
    lab, found, threads = worker.laboratory.Lab(folder), {}, torch.get_num_threads()
    torch.set_num_threads(1)
    worker.packed_cases.write_dense(lab)
    for name in names:
        given = worker.SETTINGS.get(name, {})
        trainer = found[name] = worker.cases.build(name, lab, name, processes=1, **given)
        trainer.train()
        trainer.model.save_pretrained(folder / name / "saved")
    torch.set_num_threads(threads)
    return lab, found


def train_both(worker, factory: Any, names: list[str], sharded: list[str]) -> Runs:
    lab, trainers = train_alone(worker, factory.mktemp("alone"), names)
    folder = factory.mktemp("fsdp")
    worker.packed_cases.write_dense(worker.laboratory.Lab(folder))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = [HERE / "fsdp_run.py", folder, lab.folder, *sharded]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *map(str, given)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return Runs(lab, trainers, folder, ranks)


@pytest.fixture(scope="session")
def quick(worker, tmp_path_factory) -> Runs:
    return train_both(worker, tmp_path_factory, QUICK, [*QUICK, *EXTRA["quick"]])


@pytest.fixture(scope="session")
def slow(worker, tmp_path_factory) -> Runs:
    alone = [*SLOW, *(name for name in COPIED if name not in SLOW)]
    return train_both(worker, tmp_path_factory, alone, [*SLOW, *EXTRA["slow"]])


@pytest.fixture
def runs(request, name) -> Runs:
    return request.getfixturevalue("quick" if name in QUICK else "slow")


def read(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    path = adapter if adapter.is_file() else folder / "model.safetensors"
    return safetensors.torch.load_file(path)


def assert_alike(ours, wanted, atol: float = 1e-5) -> None:
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=atol, msg=key)
        else:
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_end_where_one_does(runs, name) -> None:
    assert_alike(read(runs.folder / name / "saved"), read(runs.alone / name / "saved"))
    for rank in runs.ranks:
        assert rank[name]["losses"] == pytest.approx(runs.losses(name), abs=1e-5)


@pytest.mark.parametrize("name", SHARDED)
def test_each_process_holds_half(runs, name) -> None:
    held = [rank[name]["parameters"] for rank in runs.ranks]
    assert sum(held) == runs.ranks[0][name]["all_parameters"]
    assert runs.ranks[0][name]["kinds"] == ["DTensor"]
    assert abs(held[0] - held[1]) < 0.01 * sum(held)


def test_the_optimizer_keeps_state_of_its_half_alone(quick) -> None:
    trained = sum(p.numel() for p in quick.trainers["spiel"].model.parameters() if p.requires_grad)
    state = [rank["spiel"]["state"] for rank in quick.ranks]
    assert sum(state) == 3 * trained  # two moments and an age
    assert max(state) < 0.51 * sum(state)


def test_supports_move_alike(quick) -> None:
    replaced = {str(k): v for k, v in quick.trainers["spiel"].sparse_callback.replaced.items()}
    assert len(replaced) == 2
    assert [rank["spiel"]["replaced"] for rank in quick.ranks] == [replaced, replaced]


def test_no_bit_of_the_base_moves(quick) -> None:
    assert all(rank["spiel"]["pristine"] for rank in quick.ranks)


def test_interrupted_in_a_window_and_resumed_is_uninterrupted(quick) -> None:
    ended = read(quick.folder / "spiel" / "saved")
    assert_alike(read(quick.folder / "again" / "saved"), ended, atol=0)
    assert quick.ranks[0]["again"]["losses"] == quick.ranks[0]["spiel"]["losses"]


def test_one_process_goes_on_from_shards(quick, worker) -> None:
    trainer = worker.cases.build("spiel", quick.lab, "resumed", processes=1)
    trainer.train(resume_from_checkpoint=str(quick.folder / "spiel" / "checkpoint-4"))
    trainer.model.save_pretrained(quick.alone / "resumed" / "saved")
    ended = read(quick.alone / "spiel" / "saved")
    assert_alike(read(quick.alone / "resumed" / "saved"), ended)


def test_shards_go_on_from_one_process(quick) -> None:
    ended = read(quick.alone / "spiel" / "saved")
    assert_alike(read(quick.folder / "from-plain" / "saved"), ended)


def test_a_checkpoint_holds_adapter_and_optimizer_alone(quick) -> None:
    def files(folder: Path) -> set[str]:
        names = {path.name for path in (folder / "spiel" / "checkpoint-4").iterdir()}
        return {name for name in names if "rng_state" not in name}

    plain = files(quick.alone) - {"optimizer.pt"}
    assert files(quick.folder) == plain | {"sft_optimizer.safetensors"}


def test_stages_are_kept(quick) -> None:
    assert_alike(read(quick.folder / "sora" / "stage-1"), read(quick.alone / "sora" / "stage-1"))


def test_what_cannot_be_sharded_is_refused_before_it_is(quick) -> None:
    error = quick.ranks[0]["refused"]["error"]
    assert error.startswith("layout: got 'permuted' under FSDP, where no weight lies whole")


@pytest.mark.engines
@pytest.mark.parametrize("name", COPIED)
def test_copies_over_a_packed_base_end_where_one_process_does(slow, name) -> None:
    copied = read(slow.folder / f"ddp-{name}" / "saved")
    assert_alike(copied, read(slow.alone / name / "saved"))
    assert slow.ranks[0][f"ddp-{name}"]["kinds"] != ["DTensor"]


@pytest.mark.engines
def test_forward_passes_alone_train_copies_over_a_packed_base(slow, worker) -> None:
    trainer = worker.packed_cases.by_forward_passes(worker.cases, slow.lab, "forward", processes=1)
    trainer.train()
    trainer.model.save_pretrained(slow.alone / "forward" / "saved")
    wanted = read(slow.alone / "forward" / "saved")
    assert_alike(read(slow.folder / "forward" / "saved"), wanted)
    assert any(bool(tensor.any()) for name, tensor in wanted.items() if "values" in name)


@pytest.mark.engines
def test_the_best_adapter_is_loaded_at_the_end(slow) -> None:
    found = slow.ranks[0]["best"]["best"]
    assert found != "checkpoint-6"
    ended = read(slow.folder / "best" / "saved")
    assert_alike(ended, read(slow.folder / "best" / found), atol=0)


@pytest.mark.engines
def test_values_stay_in_full_precision_over_a_base_in_half(slow) -> None:
    found = slow.ranks[0]["half"]
    assert found["dtypes"] == ["torch.float32"]
    assert found["pristine"]
    values = read(slow.folder / "half" / "saved")
    assert {t.dtype for name, t in values.items() if "values" in name} == {torch.float32}
    # losses of bfloat16 logits, in which 4.13 has neighbours 0.03 apart
    assert found["losses"] == pytest.approx(slow.losses("spiel-few")[:4], abs=4e-2)


@pytest.mark.engines
def test_shards_made_by_hand_and_offloaded_train_as_whole_values(slow) -> None:
    found = slow.ranks[0]["offloaded"]
    assert found["moved"] > 1e-2
    assert found["error"] < 1e-5


@pytest.mark.engines
def test_a_base_packed_into_integers_stays_whole(slow) -> None:
    assert slow.ranks[0]["packed-spiel"]["kinds"] == ["DTensor", "Params4bit"]
