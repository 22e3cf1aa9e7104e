"""An optimizer that writes the weights in its own pass: the same bits, and no second write."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

import sft
from sft import SLTrainConfig, SpielConfig
from sft.adapters import residency
from sft.adapters.layer import sparse_layers
from sft.adapters.region import Positions
from sft.adapters.resident import enter_resident, leave_resident, sync_resident
from sft.homes import ResidentHomes
from sft.optim.adamw import SparseAdamW
from sft.trainer import method_optimizer

TARGETS = ["q_proj", "down_proj", "embed_tokens"]


@pytest.fixture
def model(llama):
    settings = SpielConfig(density=0.1, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(llama(), settings).train()


@pytest.fixture
def batch():
    ids = torch.randint(48, (3, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def optimizer_of(model, **options: Any) -> SparseAdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return SparseAdamW(trained, lr=0.01, weight_decay=0.1, **options)


def train(model, optimizer, batch, updates: int = 3) -> None:
    for _ in range(updates):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def contents(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def writes(monkeypatch) -> list[str]:
    """Names what writes a weight in place of the optimizer."""
    found: list[str] = []
    for name in ("write_homes_", "compose"):
        own = getattr(residency, name)

        def counted(*args: Any, own: Any = own, name: str = name, **options: Any) -> Any:
            found.append(name)
            return own(*args, **options)

        monkeypatch.setattr(residency, name, counted)
    return found


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_an_update_and_a_write(llama, batch, dtype, reference) -> None:
    results = []
    for housed in (False, True):
        settings = SpielConfig(
            density=0.1, target_modules=TARGETS, task_type="CAUSAL_LM", reference=reference
        )
        model = get_peft_model(llama().to(dtype), settings).train()
        before = contents(model)
        homes = ResidentHomes(model.base_model) if housed else None
        with sft.resident(model):
            train(model, optimizer_of(model, homes=homes), batch)
            results.append(contents(model))
        after = contents(model)
        kept = [i for i, p in enumerate(model.parameters()) if not p.requires_grad]
        assert all(torch.equal(after[i], before[i]) for i in kept)
    assert all(map(torch.equal, *results))


def test_nothing_is_written_twice(model, batch, writes) -> None:
    with sft.resident(model):
        optimizer = optimizer_of(model, homes=ResidentHomes(model.base_model))
        writes.clear()  # of entering
        train(model, optimizer, batch)
        assert writes == []
        # that holds once an update: what raises no counter of versions is written as ever
        for layer in sparse_layers(model).values():
            layer.delta_values["default"].data.mul_(2.0)
        held = contents(model)
        sync_resident(model)
        assert writes == ["write_homes_"]
        assert not all(map(torch.equal, contents(model), held))


def test_what_moves_after_the_update_is_written_as_well(model, batch, writes) -> None:
    enter_resident(model)
    model(**batch).loss.backward()
    optimizer_of(model, homes=ResidentHomes(model.base_model)).step()
    writes.clear()
    for layer in sparse_layers(model).values():
        with torch.no_grad():
            layer.delta_values["default"].mul_(2.0)
    sync_resident(model)
    assert writes == ["write_homes_"]
    leave_resident(model)


def test_after_a_forward_pass_a_sync_writes_whatever_moved_the_values(model, batch) -> None:
    """Assigned data and fused optimizers raise no version."""
    enter_resident(model)
    train(model, optimizer_of(model, homes=ResidentHomes(model.base_model)), batch, updates=1)
    model(**batch)
    held = contents(model)
    for layer in sparse_layers(model).values():
        layer.delta_values["default"].data.mul_(2.0)
    sync_resident(model)
    frozen = [i for i, p in enumerate(model.parameters()) if not p.requires_grad]
    assert not all(torch.equal(contents(model)[i], held[i]) for i in frozen)
    leave_resident(model)


def test_a_sync_restores_what_is_asked_for_no_more(model, batch) -> None:
    layers = list(sparse_layers(model).values())
    before = contents(model)
    with sft.resident(model):
        train(model, optimizer_of(model), batch, updates=1)
        for layer in layers:
            layer._disable_adapters = True  # past the verb, which would restore by itself
        sync_resident(model)
        assert [layer.content for layer in layers] == [None] * len(layers)
    kept = [i for i, p in enumerate(model.parameters()) if not p.requires_grad]
    assert all(torch.equal(contents(model)[i], before[i]) for i in kept)


def test_without_homes_all_layers_are_written_at_once(model, batch, writes) -> None:
    with sft.resident(model):
        writes.clear()
        train(model, optimizer_of(model), batch, updates=2)
        assert writes == ["write_homes_"] * 2


def test_backward_notices_what_the_optimizer_wrote(model, batch) -> None:
    with sft.resident(model):
        optimizer = optimizer_of(model, homes=ResidentHomes(model.base_model))
        stale = model(**batch).loss
        train(model, optimizer, batch, updates=1)
        with pytest.raises(RuntimeError, match="changed since this forward"):
            stale.backward()


def test_there_is_no_home_unless_w_holds_the_values(model) -> None:
    homes = ResidentHomes(model.base_model)
    layer = next(iter(sparse_layers(model).values()))
    values = layer.delta_values["default"]
    assert homes.find(values) is None
    with sft.resident(model):
        assert homes.find(values) is not None
        elsewhere = Positions(layer.delta_indices["default"].clone())
        assert layer.due().residency.home(elsewhere) is None
        assert homes.find(torch.ones(1)) is None
        with model.disable_adapter():
            assert homes.find(values) is None
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        assert homes.find(values) is None


@pytest.fixture
def tied(llama):
    """A model of which two sparse layers have one weight."""
    targets = ["embed_tokens", "lm_head", "q_proj"]
    settings = SpielConfig(density=0.1, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), settings)
    layers = {name.rpartition(".")[2]: layer for name, layer in sparse_layers(model).items()}
    layers["lm_head"].get_base_layer().weight = layers["embed_tokens"].get_base_layer().weight
    return model


def test_layers_over_one_weight_are_written_in_turn(tied, writes) -> None:
    with sft.resident(tied):
        writes.clear()
        for layer in sparse_layers(tied).values():
            layer.delta_values["default"].data.fill_(1.0)
        sync_resident(tied)
    assert writes == ["write_homes_"] * 2


def test_layers_over_one_weight_have_no_home(tied) -> None:
    model = tied
    layers = {name.rpartition(".")[2]: layer for name, layer in sparse_layers(model).items()}
    homes = ResidentHomes(model.base_model)
    with sft.resident(model):
        found = {n: homes.find(layer.delta_values["default"]) for n, layer in layers.items()}
    assert [name for name, home in found.items() if home] == ["q_proj"]


@pytest.mark.parametrize("in_backward", [False, True])
def test_updates_in_backward_leave_the_weights_alone(llama, tmp_path, in_backward) -> None:
    settings = SLTrainConfig(
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        optimizer="adamw",
        per_layer_updates=in_backward,
    )
    model = get_peft_model(llama(), settings)
    found = method_optimizer(model.base_model, TrainingArguments(output_dir=str(tmp_path)))
    assert found is not None
    assert found[0] is SparseAdamW
    assert (found[1]["homes"] is None) == in_backward


def test_values_beside_others_are_told_apart(llama) -> None:
    settings = SLTrainConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), settings)
    homes = ResidentHomes(model.base_model)
    with sft.resident(model):
        housed = [n for n, p in model.named_parameters() if homes.find(p) is not None]
    assert housed
    assert all("sltrain_values" in name for name in housed)


def test_a_copy_of_the_optimizer_has_no_homes(model) -> None:
    optimizer = optimizer_of(model, homes=ResidentHomes(model.base_model))
    assert optimizer.homes is not None
    assert copy.deepcopy(optimizer).homes is None
