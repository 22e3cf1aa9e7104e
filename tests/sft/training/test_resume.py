"""Interrupted and resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

import pytest
import torch

# Windows are updates 1-2, 5-6 and 9-10; an epoch is 8 micro-batches.
EARLY, FIRST_RESELECTION, BETWEEN, INSIDE, RESELECTION, LATE = 1, 2, 3, 5, 6, 9

RUNS = {
    "gradient": ({}, (EARLY, FIRST_RESELECTION, BETWEEN, INSIDE, RESELECTION, LATE)),
    "momentum": (
        {"growth": "momentum", "learning_rate": 0.05},
        (EARLY, FIRST_RESELECTION, INSIDE, RESELECTION),
    ),
    "static": ({"growth": "none"}, (BETWEEN, LATE)),
    "accumulation": ({"gradient_accumulation_steps": 2}, (EARLY, INSIDE, RESELECTION)),
    "whole-update": (
        {"gradient_accumulation_steps": 2, "candidates_from": "update"},
        (INSIDE, RESELECTION),
    ),
    "calibrated": (
        {"selection": "gradient", "calibration_batches": 2},
        (EARLY, INSIDE, LATE),
    ),
    "cosine": (
        {
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
            "replace_schedule": "cosine",
            "weight_decay": 0.1,
        },
        (FIRST_RESELECTION, INSIDE),
    ),
    "reference": ({"reference": True}, (INSIDE, RESELECTION)),
    "dropout": ({"dropout": 0.2}, (INSIDE,)),
    "inputs-in-int8": ({"saved_inputs": "int8"}, (EARLY, INSIDE, LATE)),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_cut_resumes_to_the_same_bits(lab, assert_equal, name):
    settings, cuts = RUNS[name]
    dropout = settings.get("dropout", 0.0)
    settings = {key: value for key, value in settings.items() if key != "dropout"}

    def run(out, resume=None, **more):
        base = lab.base(attention_dropout=dropout)
        return lab.run(out, resume, base=base, **settings, **more)

    whole = run("whole", save_strategy="steps", save_steps=1)
    for cut in cuts:
        resumed = run("resumed", lab.checkpoint("whole", cut))
        assert_equal(lab.deltas(whole.model), lab.deltas(resumed.model))
        assert_equal(
            lab.optimizer_state(whole.trainer.optimizer),
            lab.optimizer_state(resumed.trainer.optimizer),
        )
        assert resumed.losses == whole.losses


def test_two_halves_that_were_really_interrupted(lab, assert_equal):
    """The first half ends by itself: nothing of the second one has happened when it saves."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = control.should_save = state.global_step == 5
            return control

    whole = lab.run("whole")
    lab.run("half", trainer={"callbacks": [Stop()]})
    resumed = lab.run("half", True)
    assert resumed.trainer.state.global_step == 12
    assert_equal(lab.deltas(whole.model), lab.deltas(resumed.model))
    assert resumed.losses == whole.losses


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_a_resumed_run_replaces_what_the_whole_run_replaced(lab, growth):
    whole = lab.run("whole", save_strategy="steps", save_steps=5, growth=growth)
    everything = lab.deltas(whole.model)
    count = sum(t.numel() for n, t in everything.items() if "delta_values" in n)
    assert whole.replaced[2] == count, "the first reselection replaces all"
    assert sorted(whole.replaced) == [2, 6, 10]
    resumed = lab.run("whole", lab.checkpoint("whole", 5), growth=growth)
    assert resumed.replaced == {step: whole.replaced[step] for step in (6, 10)}
    assert max(resumed.replaced.values()) < count


def test_optimizer_dtypes_survive_the_load(lab):
    whole = lab.run("whole", save_strategy="steps", save_steps=7)
    resumed = lab.run("whole", lab.checkpoint("whole", 7))
    found = {n.rsplit(".")[-1]: t.dtype for n, t in lab.optimizer_state(resumed.optimizer).items()}
    assert found == {
        "age": torch.int32,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
    }
    assert (
        lab.optimizer_state(whole.optimizer).keys() == lab.optimizer_state(resumed.optimizer).keys()
    )


def test_a_stock_trainer_with_the_callback_resumes_likewise(lab, assert_equal):
    from transformers import Trainer

    from sft import SparseCallback

    def run(out, resume=None, callback=None, **more):
        extra = {"callbacks": [callback or SparseCallback()]}
        return lab.run(out, resume, cls=Trainer, trainer=extra, optim="adamw_torch", **more)

    whole = run("whole", save_strategy="steps", save_steps=5)
    here = run("whole", lab.checkpoint("whole", 5))
    assert_equal(lab.deltas(whole.model), lab.deltas(here.model))
    folder = lab.checkpoint("whole", 5)
    elsewhere = run("other", folder, SparseCallback(resume_from_checkpoint=folder))
    assert_equal(lab.deltas(whole.model), lab.deltas(elsewhere.model))
    assert_equal(
        lab.optimizer_state(whole.trainer.optimizer),
        lab.optimizer_state(elsewhere.trainer.optimizer),
    )
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        run("nothing-here", folder)


def test_true_takes_the_newest_whole_checkpoint(lab, assert_equal):
    whole = lab.run("whole", save_strategy="steps", save_steps=3)
    for step in (9, 12):
        (lab.folder / "whole" / f"checkpoint-{step}" / "sft_state.json").unlink()
    resumed = lab.run("whole", True)
    assert resumed.replaced == {10: whole.replaced[10]}
    assert_equal(lab.deltas(whole.model), lab.deltas(resumed.model))


def test_another_base_is_refused(lab):
    lab.run("whole", save_strategy="steps", save_steps=5)
    other = lab.base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ValueError, match="another base weight"):
        lab.run("whole", lab.checkpoint("whole", 5), model=lab.adapted(other))


def test_settings_that_changed_are_named(lab, caplog):
    whole = {"save_strategy": "steps", "save_steps": 5, "growth": "none"}
    lab.run("whole", **whole)
    caplog.clear()
    lab.run("same", lab.checkpoint("whole", 5), **whole)
    assert "resume:" not in caplog.text
    lab.run("other", lab.checkpoint("whole", 5), **whole | {"max_steps": 9, "seed": 3})
    assert "resume: trainer.max_steps was 12 and is now 9" in caplog.text
    assert "resume: default.seed was 0 and is now 3" in caplog.text


def test_a_support_that_begins_to_move_is_refused(lab):
    lab.run("whole", save_strategy="steps", save_steps=5, growth="none")
    with pytest.raises(ValueError, match=r"^growth: .* kept its support") as caught:
        lab.run("other", lab.checkpoint("whole", 5))
    assert "\n" not in str(caught.value)
