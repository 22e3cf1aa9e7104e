"""SoRA in training runs: stages, ranks that leave, and runs that are cut anywhere."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, get_scheduler

from sft import SoRAConfig, SparseCallback

STEPS = 12
STAGES = {"strength": 0.0, "last_strength": 6.0, "num_stages": 3}
PRUNING = {"strength": 3.0, "gate_learning_rate": 0.05}


@pytest.fixture
def sora(lab):
    def build(base=None, **fields):
        config = SoRAConfig(task_type="CAUSAL_LM", **{"r": 4, "alpha": 8, **fields})
        return get_peft_model(base or lab.base(), config)

    return build


def own(model) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if ".sora_" in n}


def ranks(model) -> list[int]:
    layers = model.base_model.adapted_layers("default").values()
    return [len(layer.sora_gate["default"]) for layer in layers]


class Spy(TrainerCallback):
    """Notes, before each update, the learning rates, and how far the optimizer's state is."""

    def __init__(self):
        self.rates, self.steps, self.strengths = [], [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer, model, **_):
        inner = optimizer.optimizer
        self.rates.append([group["lr"] for group in inner.param_groups])
        self.steps.append({int(s["step"]) for s in inner.state.values()})
        self.strengths.append(model.base_model.penalties("default")[0].strength)


@pytest.mark.parametrize(
    ("optim", "fields"),
    [
        pytest.param("adamw_torch", {"compact_after": 2}, id="compaction"),
        pytest.param("adamw_torch_fused", {"compact_after": 3}, id="compaction, fused"),
        pytest.param("sgd", {"compact_after": 2}, id="compaction, no state"),
        pytest.param(
            "adamw_torch", {**STAGES, "compact_after": 2, "l1": 0.1, "dropout": 0.2}, id="stages"
        ),
    ],
)
def test_every_cut_resumes_to_the_same_bits(lab, sora, assert_equal, optim, fields) -> None:
    fields = {**PRUNING, **fields}
    run = {"max_steps": STEPS, "optim": optim, "weight_decay": 0.1, "warmup_steps": 1}
    run |= {"learning_rate": 0.5} if optim == "sgd" else {}
    whole = lab.run("whole", model=sora(**fields), save_strategy="steps", save_steps=1, **run)
    assert sum(ranks(whole.model)) < 4 * len(ranks(whole.model))
    for cut in (3, 4, 5, 8):
        resumed = lab.run("again", lab.checkpoint("whole", cut), model=sora(**fields), **run)
        assert_equal(own(whole.model), own(resumed.model))
        one, other = whole.trainer.optimizer, resumed.trainer.optimizer
        if lab.optimizer_state(one):
            assert_equal(lab.optimizer_state(one), lab.optimizer_state(other))
        assert resumed.losses == whole.losses


def test_s10_every_stage_has_a_schedule_and_an_optimizer_of_its_own(lab, sora) -> None:
    spy = Spy()
    fields = {**STAGES, "first_stage_share": 0.5, "gate_learning_rate": 0.1}
    lab.run(
        model=sora(**fields),
        max_steps=STEPS,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=0.3,
        optim="adamw_torch",
        trainer={"callbacks": [spy]},
    )
    expected = []
    for length in (6, 3, 3):
        stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        warmup = -(-length * 3 // 10)
        stock = get_scheduler("cosine", stand_in, warmup, length)
        expected += [stock.lr_lambdas[0](step) for step in range(length)]
    assert spy.rates == [[0.01 * m, 0.01 * m, 0.1 * m] for m in expected]
    assert all(any(rate > 0 for rate in expected[start:end]) for start, end in ((6, 9), (9, 12)))
    assert spy.strengths == [0.0] * 6 + [3.0] * 3 + [6.0] * 3
    # an optimizer that made t updates in this stage
    counts = [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2]
    assert spy.steps == [{t} if t else set() for t in counts]


def test_s10_one_stage_is_the_stock_schedule(lab, sora) -> None:
    spy = Spy()
    lab.run(model=sora(), max_steps=4, warmup_steps=2, trainer={"callbacks": [spy]})
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    stock = get_scheduler("linear", stand_in, 2, 4)
    assert [rates[0] for rates in spy.rates] == [1e-2 * stock.lr_lambdas[0](t) for t in range(4)]


def test_s10_each_stage_is_kept_with_its_ranks(lab, sora, assert_equal) -> None:
    fields = {**STAGES, "gate_learning_rate": 0.05, "compact_after": 1}
    run = lab.run("run", model=sora(**fields), max_steps=STEPS, save_total_limit=1)
    folder = lab.folder / "run"
    assert sorted(p.name for p in folder.glob("stage-*")) == ["stage-1", "stage-2", "stage-3"]
    records = [json.loads((folder / f"stage-{n}/stage.json").read_text()) for n in (1, 2, 3)]
    assert [record["step"] for record in records] == [4, 8, 12]
    assert [record["sora_strength"] for record in records] == [0.0, 3.0, 6.0]
    found = [record["sora_ranks"] for record in records]
    assert found == sorted(found, reverse=True) and found[2] < found[0]
    for number, count in zip((1, 2, 3), found, strict=True):
        loaded = PeftModel.from_pretrained(lab.base(), folder / f"stage-{number}")
        gates = [t for n, t in own(loaded).items() if "sora_gate" in n]
        assert sum(int(gate.count_nonzero()) for gate in gates) == count
    assert_equal(own(loaded), own(run.model))
    # rotation took the other checkpoints
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-12"]


def test_the_log_shows_the_ranks(lab, sora) -> None:
    run = lab.run(model=sora(**PRUNING), max_steps=STEPS, logging_steps=4)
    shown = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(shown) == 3
    found = [entry["sora_ranks"] for entry in shown]
    assert found[0] > found[-1] == sum(int(t.count_nonzero()) for t in gates_of(run.model))
    assert shown[0]["sora_strength"] == 3.0
    assert shown[-1]["sora_zero_gates"] == 1 - found[-1] / (4 * len(ranks(run.model)))


def test_the_log_tells_adapters_apart(lab, sora) -> None:
    model = sora()
    model.add_adapter("other", SoRAConfig(r=2, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    entry = lab.run(model=model, max_steps=1).trainer.state.log_history[0]
    assert entry["default/sora_ranks"] == 2 * entry["other/sora_ranks"] == 4 * len(ranks(model))


def gates_of(model) -> list[torch.Tensor]:
    return [t for n, t in own(model).items() if "sora_gate" in n]


def test_gates_close_and_the_rest_learns(lab, sora) -> None:
    run = lab.run(model=sora(**PRUNING | {"strength": 1.5}), max_steps=30, optim="adamw_torch")
    closed = sum(int((gate == 0).sum()) for gate in gates_of(run.model))
    total = sum(gate.numel() for gate in gates_of(run.model))
    assert 0.2 * total < closed < 0.9 * total
    assert run.losses[-1] < run.losses[0] - 0.1


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_loss_term_counts_once_an_update(lab, sora, accumulation) -> None:
    """With B = 0 and an l1 weight far above the loss's own gradient, SGD shows it alone."""
    model = sora(strength=0.0, l1=1000.0)
    before = gates_of(model)
    settings = {"optim": "sgd", "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    lab.run(
        model=model,
        max_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        **settings,
    )
    count = sum(gate.numel() for gate in before)
    for gate, start in zip(gates_of(model), before, strict=True):
        torch.testing.assert_close(gate, start - 1e-4 * 1000 / count * start.sign())


def test_s6_the_reference_threshold_shrinks_where_no_learning_rate_is_left(lab, sora) -> None:
    found = {}
    for threshold, strength in (("lr", 100.0), ("absolute", 0.3)):
        model = sora(threshold=threshold, prox="reference", strength=strength)
        before = gates_of(model)
        lab.run(model=model, max_steps=3, learning_rate=0.0, optim="sgd")
        after = zip(before, gates_of(model), strict=True)
        found[threshold] = all(torch.equal(a, b) for a, b in after)
    assert found == {"lr": True, "absolute": False}


def test_schedules_that_cannot_begin_anew_are_refused(lab, sora) -> None:
    with pytest.raises(ValueError, match=r"^lr_scheduler_type: got .*plateau.* with a schedule"):
        lab.run(
            model=sora(**STAGES),
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps",
            metric_for_best_model="loss",
            trainer={"eval_dataset": lab.dataset(4)},
        )
    with pytest.raises(ValueError, match=r"^strength: got 3 stages with a LambdaLR that runs once"):
        callbacks = {"callbacks": [SparseCallback()]}
        lab.run(model=sora(**STAGES), cls=Trainer, trainer=callbacks)
    with pytest.raises(ValueError, match=r"^max_steps: got 2, allowed is at least 3, one update"):
        lab.run(model=sora(**STAGES), max_steps=2)


def test_adapters_whose_stages_differ_are_refused(lab, sora) -> None:
    model = sora(**STAGES)
    model.add_adapter("other", SoRAConfig(task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"^strength: got active adapters whose stages end at"):
        lab.run(model=model)


@pytest.mark.parametrize("strategy", ["no", "best"])
def test_s10_stages_are_kept_whatever_else_is_saved(lab, sora, strategy) -> None:
    # the loss falls, so that by this measure the first of all is the best
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    lab.run(
        "run",
        model=sora(**STAGES),
        max_steps=6,
        save_strategy=strategy,
        eval_strategy="steps",
        eval_steps=2,
        trainer={"eval_dataset": lab.dataset(4)},
        **best,
    )
    stages = {p.name for p in (lab.folder / "run").glob("stage-*")}
    assert stages == {"stage-1", "stage-2", "stage-3"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"l1": 0.1}, r"^l1: got 0.1 with a trainer that adds no term"),
        ({"gate_learning_rate": 0.5}, r"^gate_learning_rate: got 0.5 .* moves gates at 0.01; "),
    ],
)
def test_what_a_stock_trainer_would_leave_out_is_refused(lab, sora, fields, message) -> None:
    callbacks = {"callbacks": [SparseCallback()]}
    with pytest.raises(ValueError, match=message):
        lab.run(model=sora(**fields), cls=Trainer, trainer=callbacks)
    lab.run(model=sora(gate_learning_rate=0.01), max_steps=1, cls=Trainer, trainer=callbacks)


def test_an_optimizer_of_ones_own_must_have_the_rate_of_the_gates(lab, sora) -> None:
    def run(ask) -> None:
        model = sora(gate_learning_rate=0.5)
        groups = ask(model)
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        lab.run(model=model, max_steps=1, trainer={"optimizers": (optimizer, None)})

    with pytest.raises(ValueError, match=r"^gate_learning_rate: got 0.5 with an optimizer"):
        run(lambda model: [p for p in model.parameters() if p.requires_grad])
    run(lambda model: model.base_model.parameter_groups("default", 0.01))
