"""What every method on disk promises of a training run; a new method is tested by existing."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer

from sft import SparseCallback
from sft.adapters.registry import config_class, method_names


@pytest.fixture(params=method_names())
def method(request) -> str:
    return request.param


@pytest.fixture
def adapted(lab, method):
    def build(base=None, **settings):
        owner = config_class(method)
        if "density" in {field.name for field in fields(owner)}:
            settings.setdefault("density", 0.1)
        return get_peft_model(base or lab.base(), owner(task_type="CAUSAL_LM", **settings))

    return build


def own(model) -> dict[str, torch.Tensor]:
    prefix = f".{model.base_model.prefix}"
    return {name: t.clone() for name, t in model.state_dict().items() if prefix in name}


def frozen(model) -> dict[str, torch.Tensor]:
    prefix = f".{model.base_model.prefix}"
    return {name: t.clone() for name, t in model.state_dict().items() if prefix not in name}


@torch.no_grad()
def loss_of(model, lab) -> float:
    ids = torch.tensor(lab.dataset()["input_ids"])
    return model.eval()(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_and_resumed_is_uninterrupted(lab, adapted, assert_equal, accumulation) -> None:
    settings = {"max_steps": 6, "gradient_accumulation_steps": accumulation, "weight_decay": 0.1}
    whole = lab.run("whole", model=adapted(), save_strategy="steps", save_steps=2, **settings)
    for cut in (2, 4):
        resumed = lab.run("again", lab.checkpoint("whole", cut), model=adapted(), **settings)
        assert_equal(own(whole.model), own(resumed.model))
        assert_equal(
            lab.optimizer_state(whole.trainer.optimizer),
            lab.optimizer_state(resumed.trainer.optimizer),
        )


@pytest.mark.parametrize(("optim", "rate"), [("adamw_torch_fused", 0.02), ("sgd", 1.0)])
def test_training_moves_the_adapter_and_no_bit_of_the_base(
    lab, adapted, assert_equal, optim, rate
) -> None:
    model = adapted()
    before, start, loss = frozen(model), own(model), loss_of(model, lab)
    lab.run(model=model, optim=optim, weight_decay=0.1, learning_rate=rate)
    assert_equal(frozen(model), before)
    moved = [name for name, t in own(model).items() if not torch.equal(t, start[name])]
    assert moved
    assert loss_of(model, lab) < loss


def test_the_callback_in_a_stock_trainer_trains_the_same(lab, adapted, assert_equal) -> None:
    ours = lab.run("ours", model=adapted(), max_steps=4, optim="adamw_torch")
    stock = lab.run(
        "stock",
        model=adapted(),
        cls=Trainer,
        trainer={"callbacks": [SparseCallback()]},
        max_steps=4,
        optim="adamw_torch",
    )
    assert_equal(own(ours.model), own(stock.model))


def test_a_trained_adapter_saves_and_loads(lab, adapted, tmp_path, assert_equal) -> None:
    run = lab.run(model=adapted(), max_steps=3)
    run.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(lab.base(), tmp_path / "adapter")
    assert_equal(own(loaded), own(run.model))


def test_checkpointing_activations_changes_nothing(lab, adapted, assert_equal) -> None:
    runs = [
        lab.run(
            str(use), model=adapted(), max_steps=3, optim="sgd", activation_checkpointing=use,

        )
        for use in (False, True)
    ]  # fmt: skip
    assert_equal(own(runs[0].model), own(runs[1].model))


def test_kernels_that_cannot_run_are_refused_before_a_weight_is_written(
    lab, adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_KERNELS", "triton")
    model = adapted()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="SFT_KERNELS: got 'triton', the tensors are on cpu"):
        lab.run(model=model)
    assert all(map(torch.equal, model.parameters(), before))
