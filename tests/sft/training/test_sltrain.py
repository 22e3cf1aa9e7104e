"""SLTrain in a Trainer: both forms learn, resume exactly, and step as they go."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig

from sft import SLTrainConfig, pretrain_model


@pytest.fixture(params=["finetune", "pretrain"])
def build(request, lab):
    """Build an adapted model of one form; equal settings give equal bits."""

    def make(**fields):
        config = SLTrainConfig(**({"r": 4, "density": 0.1, "task_type": "CAUSAL_LM"} | fields))
        base = lab.base()
        if request.param == "finetune":
            return get_peft_model(base, config)
        return pretrain_model(LlamaConfig(**base.config.to_dict()), config)

    return make


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_fact26_the_loss_falls(lab, build, optim, per_layer) -> None:
    if "bit" in optim:
        pytest.importorskip("bitsandbytes")
    run = lab.run(model=build(per_layer_updates=per_layer), optim=optim)
    assert sum(run.losses[-3:]) < sum(run.losses[:3])
    assert type(run.optimizer).__name__.startswith("PerLayer") == per_layer


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_and_resumed_is_uninterrupted(
    lab, build, assert_equal, per_layer, accumulation
) -> None:
    settings = {
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
    }
    whole = lab.run("whole", model=build(per_layer_updates=per_layer), **settings)
    model = build(per_layer_updates=per_layer)
    resumed = lab.run("again", model=model, resume=lab.checkpoint("whole", 3), **settings)
    assert_equal(trained(resumed.model), trained(whole.model))
    assert_equal(
        lab.optimizer_state(resumed.trainer.optimizer), lab.optimizer_state(whole.trainer.optimizer)
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_fact24_per_layer_updates_are_the_ordinary_ones(lab, build, accumulation) -> None:
    # a norm no gradient reaches: clipping is the one thing that differs
    settings = {
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 1e3,
        "max_steps": 4,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
    }
    found = [
        lab.run(f"run{per_layer}", model=build(per_layer_updates=per_layer), **settings)
        for per_layer in (False, True)
    ]
    for (name, one), other in zip(
        trained(found[0].model).items(), trained(found[1].model).values(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6, msg=name)


def test_gradients_are_freed_as_they_come(lab, build) -> None:
    model, most = build(per_layer_updates=True), 0
    trainer = lab.trainer(model=model, max_steps=2)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def count(_):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in parameters))

    for parameter in parameters:
        # before the update's own hook, which is made in train()
        parameter.register_post_accumulate_grad_hook(count)
    trainer.train()
    # the parts of one layer, of which there are 14
    assert 1 <= most <= 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_no_update(lab, build, reentrant) -> None:
    found = [
        lab.run(
            f"run{checkpointing}",
            model=build(per_layer_updates=True),
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
            max_steps=3,
        )
        for checkpointing in (False, True)
    ]
    assert found[1].losses == pytest.approx(found[0].losses, abs=1e-5)


def test_calibration_moves_nothing_before_the_first_update(lab) -> None:
    config = SLTrainConfig(
        r=4, density=0.1, selection="gradient", per_layer_updates=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(lab.base(), config)
    before = trained(model)
    run = lab.run(model=model, learning_rate=0.0, max_steps=1)
    after = trained(run.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert max(s["step"] for s in run.optimizer.state.values()) == 1


def test_a_stock_trainer_is_told_to_use_ours(lab, build) -> None:
    from transformers import Trainer

    from sft import SparseCallback

    trainer = lab.trainer(
        model=build(per_layer_updates=True), cls=Trainer, trainer={"callbacks": [SparseCallback()]}
    )
    with pytest.raises(ValueError, match=r"^per_layer_updates: got True, but "):
        trainer.train()


def test_loss_scaling_is_refused(lab, build, monkeypatch) -> None:
    trainer = lab.trainer(model=build(per_layer_updates=True))
    monkeypatch.setattr(trainer.accelerator, "scaler", object(), raising=False)
    with pytest.raises(ValueError, match=r"^fp16: got True with per_layer_updates"):
        trainer.train()
