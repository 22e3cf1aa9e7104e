"""The cases that are compared, and the record of each, in the layout of PEFT's comparison."""

from __future__ import annotations

import copy
import json
from datetime import datetime, timezone

import pytest
import torch
from method_cases import CASES, OURS, PEERS, lora_weights
from methods import CELLS
from peft import LoraConfig
from peft_schema import record
from transformers import AutoModelForCausalLM, LlamaConfig

PARTS = {"forward", "backward", "optimizer", "selection", "wall"}


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.filterwarnings("ignore:Sparse invariant:UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_every_case_trains(base: torch.nn.Module, name: str) -> None:
    case = CASES[name](copy.deepcopy(base).train())
    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "labels": ids}
    first = case.step(batch)
    start = case.loss
    for _ in range(3):
        case.step(batch)
    assert first.keys() == PARTS
    assert case.loss == start if name == "floor" else case.loss < start
    assert sum(case.saved_bytes(batch).values()) > 0
    held = case.held_bytes()
    assert held["trained"] == held["gradients"] == 4 * case.num_trained()
    assert held["indices"] > 0 or name not in SPARSE
    assert (held["originals"] > 0) == (name in WRITTEN)


SPARSE = {name for name in CASES if name.startswith(("spiel", "sltrain", "s2ft", "shira", "super"))}
# with resident weights: what they replace is kept
WRITTEN = SPARSE - {"shira", "supertuning", "sltrain_scratch", "spiel_aside"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_reselection_is_counted_apart(base: torch.nn.Module) -> None:
    case = CASES["spiel_reselect"](copy.deepcopy(base).train())
    layers = [m for m in case.model.modules() if hasattr(m, "delta_indices")]
    before = [layer.delta_indices["default"].clone() for layer in layers]
    ids = torch.arange(32).view(2, 16)
    found = case.step({"input_ids": ids, "labels": ids})
    moved = [
        int((layer.delta_indices["default"] != old).sum())
        for layer, old in zip(layers, before, strict=True)
    ]
    assert all(moved)
    assert found["selection"] > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["shira", "supertuning", "spiel", "s2ft", "sora", "sltrain"])
def test_peers_and_ours_train_as_many_weights(base: torch.nn.Module, name: str) -> None:
    """As LoRA: but for SoRA's gates, a norm of DoRA's rows, and rounding by matrix."""
    wanted = lora_weights(base)
    assert CASES["lora"](copy.deepcopy(base)).num_trained() == wanted
    assert CASES[name](copy.deepcopy(base)).num_trained() == pytest.approx(wanted, rel=0.005)


def test_every_cell_has_the_floor_that_its_cases_are_compared_to() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert "floor" in cell.cases
        assert set(cell.cases) <= CASES.keys()
    assert {build.__name__ for build in (*PEERS, *OURS)} == set(CELLS[0].cases)


def one_record(adapter: object) -> dict[str, object]:
    times = [dict.fromkeys(sorted(PARTS), seconds) for seconds in (1.0, 3.0, 2.0)]
    return record(
        experiment="lora/tiny-float32-2x16",
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
        model_id="tiny",
        total_seconds=7.0,
        train_config={"dtype": "float32", "max_seq_length": 16, "batch_size": 2},
        adapter=adapter,
        counts={"num_trainable_params": 4, "num_total_params": 14},
        loss=1.5,
        times=times,
        held={"frozen": 40, "trained": 16, "optimizer": 32, "gradients": 16},
        saved={"Linear": 24},
        peak=100,
        alone={"file_size": 99, "peak_rss_over_base": 5},
    )


def test_peft_finds_every_key_that_its_comparison_reads() -> None:
    """The keys of method_comparison/processing.py of huggingface/peft."""
    config = LoraConfig(target_modules=["q", "v"], base_model_name_or_path="somewhere/on/a/disk")
    found = json.loads(json.dumps(one_record(config), allow_nan=False))
    run, train, meta = found["run_info"], found["train_info"], found["meta_info"]
    for key in ("experiment_name", "total_time", "peft_branch", "created_at"):
        assert run[key]
    assert datetime.fromisoformat(run["created_at"]).tzinfo is not None
    assert run["train_config"]["model_id"] == "tiny"
    assert run["peft_config"]["peft_type"] == "LORA"
    assert run["peft_config"]["target_modules"] == ["q", "v"]
    assert run["peft_config"]["base_model_name_or_path"] == "tiny"
    assert train["status"] == "success"
    for key in ("reserved_avg", "max", "reserved_99th"):
        assert train[f"accelerator_memory_{key}"] == 40 + 16 + 32 + 100
    assert (train["train_time"], train["file_size"]) == (6.0, 99)
    last = train["metrics"][-1]
    assert {"test accuracy", "train loss", "train samples", "train total tokens"} <= last.keys()
    assert last["train total tokens"] == 3 * 2 * 16
    packages = ("peft", "transformers", "datasets", "torch", "bitsandbytes")
    assert {f"{name}-version" for name in packages} <= meta["package_info"].keys()
    assert train["step"]["median_cpu_seconds"]["forward"] == 2.0
    assert one_record(None)["run_info"]["peft_config"] is None  # type: ignore[index]
