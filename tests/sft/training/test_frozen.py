"""What training must not touch, at every step and at the end."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Looks at the supports after each update, and at W while it is resident."""

    def __init__(self, pristine):
        self.pristine = pristine
        self.sizes = None
        self.supports = set()
        self.steps = 0

    def on_step_end(self, args, state, control, model, **_):
        from sft.adapters.layer import sparse_layers

        layers = sparse_layers(model)
        sizes = {n: layer.delta_values["default"].numel() for n, layer in layers.items()}
        self.sizes = self.sizes or sizes
        assert sizes == self.sizes
        for name, layer in layers.items():
            indices = layer.delta_indices["default"].long()
            numel = layer.shape[0] * layer.shape[1]
            assert indices.min() >= 0
            assert indices.max() < numel
            assert (indices[1:] > indices[:-1]).all()
            frozen = torch.ones(numel, dtype=torch.bool)
            frozen[indices] = False
            before = self.pristine[name.removeprefix("base_model.model.") + ".weight"].flatten()
            now = layer.get_base_layer().weight.detach().flatten()
            assert torch.equal(now[frozen], before[frozen])
        self.supports.add(tuple(indices.tolist()))
        self.steps += 1


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.5},
        {"growth": "momentum", "learning_rate": 0.05, "weight_decay": 0.5},
        {"growth": "none", "weight_decay": 0.5, "max_steps": 20},
        {"optimizer": "trainer", "optim": "adamw_torch", "weight_decay": 0.5, "max_steps": 20},
    ],
    ids=["gradient", "momentum", "static", "stock-adamw"],
)
def test_a_hundred_updates_leave_the_base_as_it_was(lab, assert_equal, settings):
    base = lab.base()
    pristine = lab.weights(base)
    watch = Watch(pristine)
    settings = {"max_steps": 100, "logging_steps": 100} | settings
    run = lab.run(base=base, trainer={"callbacks": [watch]}, **settings)
    assert watch.steps == settings["max_steps"]
    assert (len(watch.supports) > 1) == (settings.get("growth") != "none")
    assert_equal(lab.weights(run.model), pristine)
    values = [t for n, t in lab.deltas(run.model).items() if "values" in n]
    assert all(t.abs().max() > 0 for t in values)
    assert all(p.grad is None for n, p in run.model.named_parameters() if "delta_" not in n)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_the_base_as_it_was(lab, assert_equal, error):
    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step == 5:
                weights = lab.weights(model)
                assert any(not torch.equal(weights[n], pristine[n]) for n in weights)
                raise error("stop")

    base = lab.base()
    pristine = lab.weights(base)
    trainer = lab.trainer(base=base, trainer={"callbacks": [Fail()]})
    with pytest.raises(error):
        trainer.train()
    assert_equal(lab.weights(trainer.model), pristine)


def test_nothing_listens_to_backward_after_training(lab):
    """A run that stops inside a window must not leave its accumulators behind."""
    from sft.adapters.layer import sparse_layers

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 5
            return control

    run = lab.run(trainer={"callbacks": [Stop()]})
    taps = [layer.site("default").tap for layer in sparse_layers(run.model).values()]
    assert taps
    assert not any(taps)


def test_a_calibrated_support_is_chosen_before_the_first_update(lab):
    settings = {"growth": "none", "max_steps": 1}
    base = {"cls": "LlamaForCausalLM", "attention_dropout": 0.5}
    run = lab.run(base=lab.base(**base), selection="gradient", calibration_batches=2, **settings)
    random = lab.run(base=lab.base(**base), selection="random", **settings)
    chosen, drawn = lab.deltas(run.model), lab.deltas(random.model)
    assert any(not torch.equal(chosen[n], drawn[n]) for n in chosen if "indices" in n)
    assert run.losses == random.losses, "calibration draws nothing from the generators"
