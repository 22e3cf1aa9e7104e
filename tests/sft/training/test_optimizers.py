"""Any optimizer on the same leaves: what it moved is what the model multiplies with."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

STOCK = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_bnb_8bit", "lion_8bit"]


class InSync(TrainerCallback):
    """After each update W holds the originals plus the deltas, at every support."""

    def __init__(self, pristine):
        self.pristine, self.checks = pristine, 0

    def on_optimizer_step(self, args, state, control, model, **_):
        self.check(model)

    def on_step_end(self, args, state, control, model, **_):
        self.check(model)

    def check(self, model):
        from sft.adapters.layer import sparse_layers

        for name, layer in sparse_layers(model).items():
            original = self.pristine[name.removeprefix("base_model.model.") + ".weight"]
            delta = layer.get_delta_weight("default")
            assert torch.equal(layer.get_base_layer().weight, original + delta), name
        self.checks += 1


@pytest.mark.parametrize("optim", STOCK)
def test_stock_optimizers_train_across_reselections(lab, optim):
    if "bit" in optim:
        pytest.importorskip("bitsandbytes")
    base = lab.base()
    watch = InSync(lab.weights(base))
    trainer = lab.trainer(
        base=base,
        optimizer="trainer",
        optim=optim,
        learning_rate={"sgd": 1.0, "lion_8bit": 3e-3}.get(optim, 1e-2),
    )
    trainer.add_callback(watch)
    trainer.train()
    assert watch.checks == 24
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert sorted(trainer.sparse_callback.replaced) == [2, 6, 10]
    assert "Sparse" not in type(trainer.optimizer.optimizer).__name__


class StateByPosition(TrainerCallback):
    """Compares optimizer state by position, not by slot, across each reselection."""

    def __init__(self):
        self.kept = self.grown = 0

    def look(self, model, optimizer):
        return {
            (name, int(position), key): float(value[slot])
            for name, parameter in model.named_parameters()
            if "delta_values" in name
            for key, value in optimizer.optimizer.state[parameter].items()
            if value.shape == parameter.shape
            for slot, position in enumerate(model.get_buffer(name.replace("values", "indices")))
        }

    def on_optimizer_step(self, args, state, control, model, optimizer, **_):
        self.before = self.look(model, optimizer)

    def on_step_end(self, args, state, control, model, optimizer, **_):
        after = self.look(model, optimizer)
        assert len(after) == len(self.before)
        for place, value in after.items():
            assert value == self.before.get(place, value), place
        self.kept += len(after.keys() & self.before.keys())
        fresh = [value for place, value in after.items() if place not in self.before]
        self.grown += sum(value != 0 for value in fresh)
        assert self.grown or not fresh


@pytest.mark.parametrize("optim", ["sparse", "adamw_torch", "adamw_torch_fused"])
def test_state_follows_its_entry_and_grown_ones_are_seeded(lab, optim):
    watch = StateByPosition()
    named = {} if optim == "sparse" else {"optim": optim, "optimizer": "trainer"}
    trainer = lab.trainer(max_steps=8, replace_fraction=0.5, **named)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.kept
    assert watch.grown


def test_what_is_merged_is_what_was_trained(lab):
    run = lab.run(optimizer="trainer", optim="adamw_torch_fused")
    batch = torch.tensor(lab.dataset(4)["input_ids"])
    from sft import resident

    with torch.no_grad(), resident(run.model):
        trained = run.model(input_ids=batch).logits
    merged = run.model.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(merged(input_ids=batch).logits, trained)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "SparseAdamW"),
        ({"growth": "momentum"}, "SM3"),
        ({"optim": "sgd"}, "SGD"),
        ({"optim": "sgd", "optimizer": "adamw"}, "SparseAdamW"),
        ({"optimizer": "trainer"}, "AdamW"),
        ({"optimizer": "sm3", "growth": "none"}, "SM3"),
    ],
)
def test_who_chooses_the_optimizer(lab, settings, name):
    trainer = lab.trainer(**settings)
    assert type(trainer.create_optimizer()).__name__ == name


def test_an_optimizer_that_was_passed_is_kept(lab):
    model = lab.adapted()
    mine = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    trainer = lab.trainer(model=model, trainer={"optimizers": (mine, None)})
    trainer.train()
    assert trainer.optimizer.optimizer is mine
    theirs = lab.trainer(trainer={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})})
    assert type(theirs.create_optimizer()) is torch.optim.SGD


def test_settings_reach_the_optimizer(lab):
    trainer = lab.trainer(
        learning_rate=3e-3, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-5, weight_decay=0.3
    )
    groups = trainer.create_optimizer().param_groups
    decayed = [group for group in groups if group["params"]]
    assert len(decayed) == 1
    found = {key: decayed[0][key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert found == {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.3}


def test_a_new_model_and_learning_rate_reach_the_next_optimizer(lab):
    """As in a hyperparameter search: model_init makes another model for every run."""
    trainer = lab.trainer(
        learning_rate=0.05, trainer={"model_init": lambda: lab.adapted(growth="momentum")}
    )
    for rate in (0.05, 0.02):
        trainer.args.learning_rate = rate
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        assert optimizer.param_groups[0]["initial_lr"] == rate
        for name, parameter in trainer.model.named_parameters():
            if "delta_values" in name:
                assert optimizer.accumulators(parameter) is not None, name


@pytest.mark.parametrize("given", ["adamw", "trainer"])
def test_growth_by_momentum_needs_sm3(lab, given):
    with pytest.raises(ValueError, match=r"^(optimizer|growth): ") as caught:
        lab.trainer(growth="momentum", optimizer=given).train()
    assert "\n" not in str(caught.value)
    assert "sm3" in str(caught.value).lower()


def test_a_stock_trainer_cannot_grow_by_momentum(lab, assert_equal):
    from transformers import Trainer

    from sft import SparseCallback

    base = lab.base()
    pristine = lab.weights(base)
    model = lab.adapted(base, growth="momentum", init_weights=False)
    trainer = lab.trainer(model=model, cls=Trainer, trainer={"callbacks": [SparseCallback()]})
    with pytest.raises(ValueError, match=r"^growth: 'momentum' reads SM3's"):
        trainer.train()
    assert_equal(lab.weights(model), pristine)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loop_of_ones_own_stays_in_sync(lab, fused):
    """Fused optimizers move a parameter without raising its version."""
    from sft import resident
    from sft.adapters.layer import sparse_layers

    model = lab.adapted()
    pristine = lab.weights(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=fused)
    ids = torch.tensor(lab.dataset(4)["input_ids"])
    bystander = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    with resident(model):
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            bystander.step()  # between forward and backward, but none of ours
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model(input_ids=ids)
            for name, layer in sparse_layers(model).items():
                original = pristine[name.removeprefix("base_model.model.") + ".weight"]
                delta = layer.get_delta_weight("default")
                assert delta.any()
                assert torch.equal(layer.get_base_layer().weight, original + delta), name
