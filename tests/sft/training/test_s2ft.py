"""S2FT in a Trainer: any optimizer, nothing frozen moves, resume, calibration."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

import sft
from sft import S2FTConfig
from sft.adapters.layer import sparse_layers

OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_bnb_8bit"]


@pytest.fixture
def adapt(lab):
    """Adapt the lab's base, in grouped-query attention, with S2FT."""

    def build(base=None, **settings):
        settings = {"ratio": 0.2} | settings
        return get_peft_model(base or lab.base(), S2FTConfig(task_type="CAUSAL_LM", **settings))

    return build


def slices(model):
    return {n: t.clone() for n, t in model.state_dict().items() if "s2ft_" in n}


def weights(model):
    named = model.base_model.model.named_parameters()
    return {n.replace(".base_layer", ""): p.detach().clone() for n, p in named if "s2ft_" not in n}


class Frozen(TrainerCallback):
    """After each update W holds the originals plus the deltas; all that is frozen has its bits."""

    def __init__(self, pristine):
        self.pristine, self.checks = pristine, 0

    def on_step_end(self, args, state, control, model, **_):
        now = weights(model)
        for name, layer in sparse_layers(model).items():
            key = name.removeprefix("base_model.model.") + ".weight"
            delta, found = layer.get_delta_weight("default"), now.pop(key)
            trained = torch.zeros_like(found, dtype=torch.bool)
            trained[:, layer.s2ft_indices["default"].long()] = True
            assert torch.equal(found[~trained], self.pristine[key][~trained]), name
            assert torch.equal(found, (self.pristine[key] + delta).to(found.dtype)), name
            assert delta[trained].any()
        for name, tensor in now.items():
            assert torch.equal(tensor, self.pristine[name]), name
        self.checks += 1


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_s2ft_fact05_fact09_no_optimizer_moves_what_is_frozen(lab, adapt, optim, accumulation):
    if "bit" in optim:
        pytest.importorskip("bitsandbytes")
    model = adapt()
    pristine = weights(model)
    watch = Frozen(pristine)
    run = lab.run(
        model=model,
        trainer={"callbacks": [watch]},
        optim=optim,
        weight_decay=0.5,
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0 if optim == "sgd" else 1e-2,
        max_steps=8,
    )
    assert watch.checks == 8
    assert run.losses[-1] < run.losses[0]
    after = weights(model)
    assert all(torch.equal(after[name], pristine[name]) for name in pristine)


def test_s2ft_fact09_a_grad_scaler_that_skips_a_step_leaves_the_weight_in_sync(adapt, lab):
    model = adapt().train()
    pristine = weights(model)
    ids = torch.tensor(lab.dataset(4)["input_ids"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    watch = Frozen(pristine)
    with sft.resident(model):
        for step in range(4):
            loss = model(input_ids=ids, labels=ids).loss * (float("inf") if step == 2 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            watch.on_step_end(None, None, None, model)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("layout", ["index", "permuted"])
@pytest.mark.parametrize("cut", [1, 3])
def test_s2ft_fact09_fact26_resumed_equals_uninterrupted(lab, adapt, assert_equal, layout, cut):
    def run(out, resume=None):
        settings = {"selection": "activation", "calibration_batches": 2, "layout": layout}
        base = lab.base(num_key_value_heads=4)
        model = adapt(base, ratio={"down": 0.2}, allocation="pooled", **settings)
        return lab.run(out, resume, model=model, max_steps=6, save_strategy="steps", save_steps=1)

    whole = run("whole")
    resumed = run("resumed", lab.checkpoint("whole", cut))
    assert resumed.losses == whole.losses
    assert_equal(slices(resumed.model), slices(whole.model))
    assert_equal(lab.optimizer_state(resumed.optimizer), lab.optimizer_state(whole.optimizer))


@pytest.mark.parametrize("reentrant", [False, True])
def test_s2ft_fact26_checkpointing_changes_nothing_and_the_loss_falls(lab, adapt, reentrant):
    runs = [
        lab.run(
            model=adapt(),
            learning_rate=5e-2,
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        for checkpointing in (False, True)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    assert runs[0].losses[-1] < runs[0].losses[0] - 0.05


@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_calibration_chooses_before_the_first_update(lab, adapt, selection):
    model = adapt(selection=selection)
    placeholder = slices(model)
    run = lab.run(model=model, max_steps=1)
    moved = [not torch.equal(t, placeholder[n]) for n, t in slices(model).items() if "indices" in n]
    assert any(moved)
    drawn = lab.run(model=adapt(), max_steps=1)
    assert run.losses == drawn.losses, "calibration draws nothing from the generators"


def test_s2ft_fact11_small_steps_reach_a_bfloat16_weight(lab, adapt):
    """A hundred steps of 1e-5: too small for bfloat16 each, not for the float32 deltas."""
    model = adapt(lab.base().bfloat16()).train()
    layer = next(iter(sparse_layers(model).values()))
    before = layer.get_base_layer().weight.detach().clone()
    where = layer.s2ft_indices["default"].long()
    values = layer.s2ft_values["default"]
    without = before[:, where].clone()
    optimizer = torch.optim.SGD([values], lr=1e-5)
    with sft.resident(model):
        for _ in range(100):
            values.grad = torch.ones_like(values)
            optimizer.step()
            without -= 1e-5
        moved = before[:, where] - layer.get_base_layer().weight[:, where]
    assert torch.equal(values, torch.full_like(values, values.flatten()[0].item()))
    assert values.flatten()[0].item() == pytest.approx(-1e-3, rel=1e-3)
    large = before[:, where].abs() > 0.02  # one step is less than half a unit in the last place
    assert large.any()
    assert torch.equal(without[large], before[:, where][large])
    assert moved.mean().item() == pytest.approx(1e-3, rel=0.1)
