"""DeepSpeed: two processes end where one does on the whole batch, at every stage of ZeRO."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

# an adapted embedding is saved with its table
pytestmark = pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
HERE = Path(__file__).parent


def load(name: str) -> Any:
    """Import a script of this folder as a module; nothing in it imports DeepSpeed by itself."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


worker = load("deepspeed_run")
TOGETHER = ["interrupted", "from-plain", "best", "half", "offloaded", "partitioned-base", "refused"]
FURTHER = [*worker.FURTHER, "best-table"]


def launch(folder: Path, processes: int, names: list[str]) -> list[dict[str, Any]]:
    """Run cases in that many processes; return what each of them found."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(processes)),
        *(str(HERE / "deepspeed_run.py"), str(folder), *names),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment)
    told = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(told[-60:]) or done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    """Trains a case in this process without DeepSpeed, once."""
    lab = worker.laboratory.Lab(tmp_path_factory.mktemp("alone"))
    worker.packed_cases.write_dense(lab)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done: dict[str, Any] = {}

    def train(name: str, **settings: Any) -> Any:
        if name not in done:
            trainer = worker.cases.build(name, lab, name, processes=1, **settings)
            trainer.train()
            trainer.save_model(str(lab.folder / name / "saved"))
            done[name] = worker.told(trainer)
        return SimpleNamespace(folder=lab.folder, **done[name])

    yield train
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Any:
    """What two processes found in every case, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("deepspeed")
    lab = worker.laboratory.Lab(folder)
    special = sys.modules["deepspeed_special"]
    worker.packed_cases.write_dense(lab)
    worker.cases.build("spiel", lab, "plain", processes=1, **special.SAVING).train()
    ranks = launch(folder, 2, [*worker.RUNS, *TOGETHER])
    return SimpleNamespace(folder=folder, lab=lab, ranks=ranks, found=ranks[0])


def saved(folder: Path, name: str, file: str = "adapter_model.safetensors") -> dict[str, Any]:
    return safetensors.torch.load_file(folder / name / "saved" / file)


def assert_close(found: dict[str, Any], wanted: dict[str, Any], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=atol, msg=key)
        else:
            assert torch.equal(found[key], tensor), key


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def assert_ends_alike(model: str, name: str, sharded: Any, alone: Any) -> None:
    found, wanted = sharded.found[name], alone(model)
    file = "model.safetensors" if model == "full" else "adapter_model.safetensors"
    assert_close(saved(sharded.folder, name, file), saved(wanted.folder, model, file))
    assert found["losses"] == pytest.approx(wanted.losses, abs=1e-5)
    assert found["replaced"] == {str(step): n for step, n in wanted.replaced.items()}
    assert found["processes"] == 2


@pytest.mark.parametrize("name", list(worker.RUNS))
def test_two_processes_end_where_one_does(sharded, alone, name) -> None:
    assert_ends_alike(worker.RUNS[name][0], name, sharded, alone)


@pytest.fixture(scope="module")
def further(tmp_path_factory) -> Any:
    """What two processes found in the cases that are left."""
    folder = tmp_path_factory.mktemp("further")
    worker.packed_cases.write_dense(worker.laboratory.Lab(folder))
    return SimpleNamespace(folder=folder, found=launch(folder, 2, FURTHER)[0])


@pytest.mark.engines
@pytest.mark.parametrize("name", list(worker.FURTHER))
def test_further_runs_end_where_one_process_does(further, alone, name) -> None:
    assert_ends_alike(worker.FURTHER[name][0], name, further, alone)


@pytest.mark.parametrize("name", ["spiel-2", "s2ft-2"])
def test_the_optimizer_steps_flat_vectors(sharded, name) -> None:
    (shape,) = sharded.found[name]["stepped"]
    trained = saved(sharded.folder, name)
    entries = sum(t.numel() for key, t in trained.items() if "values" in key)
    assert entries / 2 <= shape[0] < entries  # half of them, padded


@pytest.mark.parametrize("name", ["spiel", "sora"])
def test_a_resumed_run_ends_as_the_whole_one_bit_for_bit(sharded, name) -> None:
    assert_same(saved(sharded.folder, f"{name}-resumed-2"), saved(sharded.folder, f"{name}-whole"))
    found = sharded.found["interrupted"][name]
    assert found["losses-2"] == found["losses"]


@pytest.mark.parametrize("run", ["spiel-resumed-3", "spiel-resumed-0", "sora-resumed-3"])
def test_a_run_goes_on_at_another_stage(sharded, run) -> None:
    whole = run.split("-")[0] + "-whole"
    assert_close(saved(sharded.folder, run), saved(sharded.folder, whole), atol=1e-6)


def test_a_run_goes_on_in_one_process(sharded) -> None:
    (found,) = launch(sharded.folder, 1, ["one-process"])
    assert found["one-process"]["processes"] == 1
    assert_close(saved(sharded.folder, "one-process"), saved(sharded.folder, "spiel-whole"), 1e-6)


def test_a_run_goes_on_without_deepspeed(sharded) -> None:
    trainer = worker.cases.build("spiel", sharded.lab, "without", processes=1)
    trainer.train(resume_from_checkpoint=sharded.lab.checkpoint("spiel-whole", 5))
    trainer.save_model(str(sharded.folder / "without" / "saved"))
    assert_close(saved(sharded.folder, "without"), saved(sharded.folder, "spiel-whole"), 1e-6)


def test_a_run_without_deepspeed_goes_on_with_it(sharded, alone) -> None:
    wanted = alone("spiel")
    assert_close(saved(sharded.folder, "from-plain"), saved(wanted.folder, "spiel"), atol=1e-6)


def test_a_checkpoint_holds_no_part_of_a_rank(sharded) -> None:
    files = sharded.found["interrupted"]["spiel"]["files"]
    assert "sft_optimizer.safetensors" in files
    assert not [name for name in files if name.startswith("global_step") or "zero" in name]


def test_the_best_checkpoint_is_loaded_with_its_support(sharded) -> None:
    assert sharded.found["best"]["best"] == "checkpoint-4"
    checkpoints = [
        safetensors.torch.load_file(
            sharded.folder / "best" / f"checkpoint-{step}" / "adapter_model.safetensors"
        )
        for step in (4, 8)
    ]
    found = saved(sharded.folder, "best")
    assert_same(found, checkpoints[0])
    assert any(not torch.equal(found[key], checkpoints[1][key]) for key in found)


@pytest.mark.engines
def test_the_best_checkpoint_of_an_adapted_embedding_is_loaded(further) -> None:
    folder, best = further.folder / "best-table", further.found["best-table"]["best"]
    kept = safetensors.torch.load_file(folder / best / "adapter_model.safetensors")
    assert_same(saved(further.folder, "best-table"), kept)
    assert kept["base_model.model.model.embed_tokens.base_layer.weight"].shape == (64, 32)


@pytest.mark.parametrize("stage", [2, 3])
def test_files_hold_the_masters_of_a_half_precision_run(sharded, stage) -> None:
    values = [t for key, t in saved(sharded.folder, f"half-{stage}").items() if "values" in key]
    assert all(tensor.dtype == torch.float32 for tensor in values)
    assert any(bool((tensor != tensor.bfloat16()).any()) for tensor in values)
    losses = sharded.found["half"][str(stage)]["losses"]
    assert losses == pytest.approx(sharded.found["spiel-2"]["losses"], abs=2e-2)


def test_frozen_weights_are_as_loaded_after_a_half_precision_run(sharded) -> None:
    assert sharded.found["half"]["frozen"]


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_keeps_the_methods_optimizer_and_changes_no_result(sharded, stage) -> None:
    assert sharded.found["offloaded"][str(stage)] == "SparseAdamW"
    found = saved(sharded.folder, f"offloaded-{stage}")
    assert_close(found, saved(sharded.folder, "spiel-2"), atol=1e-6)


@pytest.mark.parametrize("name", ["magnitude", "weight", "sora"])
def test_an_adapter_on_a_partitioned_base_looks_at_its_weights(sharded, name) -> None:
    from peft import PeftConfig, PeftModel, get_peft_model
    from transformers import LlamaForCausalLM

    assert sharded.found["partitioned-base"][name]["sizes"] == [0]
    folder = sharded.folder / f"partitioned-{name}" / "saved"
    # the file's fingerprints are those of the whole base
    bases = [LlamaForCausalLM.from_pretrained(sharded.folder / "base") for _ in range(2)]
    loaded = PeftModel.from_pretrained(bases[0], folder).state_dict()
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = config.from_file = False
    fresh = get_peft_model(bases[1], config).state_dict()
    fixed = [key for key in fresh if "indices" in key or "_base." in key]
    assert fixed
    assert all(torch.equal(loaded[key], fresh[key]) for key in fixed)


REFUSALS = {
    "sm3": "optimizer: got sm3 under ZeRO",
    "sm3-static": "optimizer: got sm3 under ZeRO",
    "per-layer": "per_layer_updates: got True under DeepSpeed",
    "compaction": "compact_after: got 2 under DeepSpeed",
    "pretrain": "form: got 'pretrain' under ZeRO-3",
    "experts": "target_modules: got the experts of ",
    "storage": "bnb_4bit_quant_storage: got float32 under DeepSpeed in bfloat16",
    "permuted": "layout: got 'permuted' under ZeRO-3",
    "half-0": "deepspeed.zero_optimization.stage: got 0 with bf16",
    "optimizer": "deepspeed.optimizer: got 'AdamW'",
    "forced": "deepspeed.zero_force_ds_cpu_optimizer: got true",
    "calibrated": "selection: got 'gradient' under ZeRO-3",
    "pooled": "allocation: got 'pooled'",
    "l1": "l1: its term of the loss",
    "nvme": "deepspeed.zero_optimization.offload_optimizer.device: got 'nvme'",
    "eight-bit": "optim: got bitsandbytes' AdamW under ZeRO",
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_what_cannot_run_is_refused_with_what_can(sharded, name) -> None:
    said = sharded.found["refused"][name]
    assert said.startswith(REFUSALS[name])
    assert "; set " in said or "; leave " in said or ", or set " in said
    assert "\n" not in said


def test_all_processes_find_the_same(sharded) -> None:
    for name in worker.RUNS:
        for key in ("losses", "replaced"):
            assert sharded.ranks[0][name][key] == sharded.ranks[1][name][key], name


@pytest.mark.engines
def test_deepspeeds_own_adam_steps_and_moves_with_a_support(alone, tmp_path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed's Adam is compiled by g++, which is not here")
    (found,) = launch(tmp_path, 1, ["native"])
    assert found["native"]["steps"] == "DeepSpeedCPUAdam"
    method, settings = sys.modules["deepspeed_special"].STOCK
    worker.cases.MODELS["native"] = (worker.cases.peft(method, **settings), {})
    assert_close(saved(tmp_path, "native"), saved(alone("native").folder, "native"))
