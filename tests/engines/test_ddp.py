"""DDP: two processes with half a batch each end where one process ends with the whole."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
METHODS = [
    "full", "lora", "spiel", "spiel-accumulated", "spiel-momentum", "spiel-calibrated",
    "spiel-nf4", "s2ft", "s2ft-activation", "s2ft-gradient", "s2ft-experts", "sora", "sltrain",
    "sltrain-scale", "sltrain-pretrain",
]  # fmt: skip


@pytest.fixture(scope="session")
def script() -> Any:
    """What two processes run, as a module."""
    spec = importlib.util.spec_from_file_location("ddp_run", HERE / "ddp_run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def alone(script, tmp_path_factory) -> dict[str, Any]:
    """Return what this process alone ends with, in every case."""
    lab = script.laboratory.Lab(tmp_path_factory.mktemp("alone"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name in METHODS:
        trainer = script.cases.build(name, lab, name, processes=1)
        trainer.train()
        found[name] = script.cases.left_by(trainer)
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Let two processes run, and return where they wrote."""
    found = tmp_path_factory.mktemp("ddp")
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(HERE / "ddp_run.py"), str(found)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.fixture(scope="session")
def ranks(folder) -> list[dict[str, Any]]:
    """Return what each process found."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare two dictionaries of tensors to 1e-5."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5, msg=name)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare two dictionaries of tensors to the bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_every_case_is_trained(script) -> None:
    assert list(script.cases.MODELS) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_end_where_one_ends_on_the_whole_batch(ranks, alone, name) -> None:
    shared = ranks[0]["cases"][name]
    assert shared["processes"] == 2
    close(alone[name]["trained"], shared["trained"])
    assert shared["losses"] == pytest.approx(alone[name]["losses"], abs=1e-5)
    assert len(shared["losses"]) == 8


@pytest.mark.parametrize("name", METHODS)
def test_supports_are_those_of_one_process(ranks, alone, name) -> None:
    for rank in ranks:
        same(alone[name]["supports"], rank["cases"][name]["supports"])
        assert rank["cases"][name]["replaced"] == alone[name]["replaced"]


@pytest.mark.parametrize("name", METHODS)
def test_the_processes_end_alike_and_the_base_as_it_was(ranks, alone, name) -> None:
    """Even though one of them began with other weights: DDP sends those of the first."""
    first, second = (rank["cases"][name] for rank in ranks)
    same(first["trained"], second["trained"])
    same(first["whole"], second["whole"])
    same(first["whole"], alone[name]["whole"])


@pytest.mark.parametrize("name", ["spiel", "spiel-accumulated", "spiel-momentum"])
def test_supports_did_change(ranks, name) -> None:
    assert set(ranks[0]["cases"][name]["replaced"]) == {2, 5}


def test_gates_close_alike(ranks, alone) -> None:
    def closed(left: dict[str, Any]) -> list[torch.Tensor]:
        return [t == 0 for n, t in left["trained"].items() if "gate" in n]

    found = closed(alone["sora"])
    assert 0 < sum(int(t.sum()) for t in found) < sum(t.numel() for t in found)
    for rank in ranks:
        assert all(map(torch.equal, closed(rank["cases"]["sora"]), found))


def test_indices_are_sent_once_and_not_with_every_forward(ranks) -> None:
    sent = ranks[0]["cases"]
    assert not any(sent[name]["buffers sent"] for name in METHODS if name not in ("full", "lora"))
    assert sent["full"]["buffers sent"] and sent["lora"]["buffers sent"]


def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(ranks) -> None:
    for rank in ranks:
        whole, again = rank["cases"]["spiel"], rank["resumed"]
        same(whole["trained"], again["trained"])
        same(whole["supports"], again["supports"])
        assert again["replaced"] == {5: whole["replaced"][5]}


def test_a_run_of_two_processes_goes_on_in_one(script, folder, ranks, tmp_path) -> None:
    lab = script.laboratory.Lab(tmp_path)
    trainer = script.cases.build("spiel", lab, "one", processes=1)
    trainer.train(str(folder / "spiel" / f"checkpoint-{script.CUT}"))
    found = script.cases.left_by(trainer)
    close(ranks[0]["cases"]["spiel"]["trained"], found["trained"])
    same(ranks[0]["cases"]["spiel"]["supports"], found["supports"])


def test_a_checkpoint_names_what_every_process_wrote(script, folder) -> None:
    from sft.checkpoint import check_whole

    files = check_whole(folder / "spiel" / f"checkpoint-{script.CUT}")["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files)


def test_the_processes_read_different_rows(ranks, script, tmp_path) -> None:
    first, second = (set(map(tuple, rank["rows"])) for rank in ranks)
    dataset = script.cases.rows(script.laboratory.Lab(tmp_path))
    assert first | second == set(map(tuple, dataset["input_ids"]))
    assert len(ranks[0]["rows"]) == len(ranks[1]["rows"]) == len(dataset) / 2


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("compaction", "ValueError: compact_after: got 2 on several processes"),
        ("per layer", "ValueError: per-layer updates: got 2 processes"),
        ("elsewhere", "RuntimeError: gradient of experts."),
        ("apart", "RuntimeError: supports: differs between the ranks"),
    ],
)
def test_what_cannot_be_is_refused_by_every_process(ranks, what, wanted) -> None:
    for rank in ranks:
        assert rank["refused"][what].startswith(wanted)
        assert "\n" not in rank["refused"][what]
        assert rank["refused"]["alike"] == ""


@pytest.mark.parametrize("whole", ["False", "True"])
def test_a_layer_that_one_rank_did_not_reach_counts_with_zeros(ranks, whole) -> None:
    """The second update reached the layer on the first rank alone, the third on none."""
    first, second = (rank["window"][whole] for rank in ranks)
    means = [(a + b) / 2 for a, b in zip(first["gradients"], second["gradients"], strict=True)]
    scores = means[0].abs()
    scores[torch.arange(0, 10, 2)] = -1
    chosen = scores.topk(5).indices.sort().values
    for found in (first, second):
        assert found["candidates"].tolist() == chosen.tolist()
        assert found["updates"] == 2
        torch.testing.assert_close(found["total"], (means[0] + means[1])[chosen])
        torch.testing.assert_close(found["square"], (means[0].square() + means[1].square())[chosen])
