"""SparseTrainer is a Trainer: its options keep their meaning."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainerCallback

from sft.adapters.packing import unpack_supports


def evaluated(lab, **more):
    return {"trainer": {"eval_dataset": lab.dataset(8), **more}}


def test_the_loss_falls_and_the_model_keeps_what_was_learned(lab):
    trainer = lab.trainer(max_steps=30, **evaluated(lab))
    before = trainer.evaluate()["eval_loss"]
    assert torch.isfinite(torch.tensor(before))
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 0.05
    predicted = trainer.predict(lab.dataset(8))
    assert predicted.metrics["test_loss"] == pytest.approx(after, abs=1e-5)


def test_evaluation_between_updates_sees_the_trained_weights(lab):
    trainer = lab.trainer(max_steps=9, eval_strategy="steps", eval_steps=3, **evaluated(lab))
    trainer.train()
    found = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(found) == 3
    assert found[2] < found[0]
    plain = lab.run("plain", max_steps=9)
    ours, theirs = lab.deltas(trainer.model), lab.deltas(plain.model)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours), "evaluating changes nothing"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found[2], abs=1e-5)


def test_the_best_model_is_loaded_at_the_end(lab, assert_equal):
    """Also where W holds effective weights: the file was made for the pre-trained ones."""
    from safetensors.torch import load_file

    base = lab.base()
    pristine = lab.weights(base)
    trainer = lab.trainer(
        base=base,
        density=0.5,
        max_steps=12,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first one, so that it is not the last one
        **evaluated(lab),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-3")
    saved = {f"{n}.default": t for n, t in load_file(f"{best}/adapter_model.safetensors").items()}
    saved = unpack_supports(trainer.model, "default", saved)
    found = lab.deltas(trainer.model)
    assert_equal(found, saved)
    assert_equal(lab.weights(trainer.model), pristine)


def test_bfloat16_autocast_trains(lab, assert_equal):
    base = lab.base()
    pristine = lab.weights(base)
    run = lab.run(base=base, bf16=True, max_steps=20)
    assert sum(run.losses[-3:]) < sum(run.losses[:3])
    assert {t.dtype for n, t in lab.deltas(run.model).items() if "values" in n} == {torch.float32}
    assert_equal(lab.weights(run.model), pristine)


def test_a_bfloat16_base_trains(lab, assert_equal):
    base = lab.base().to(torch.bfloat16)
    pristine = lab.weights(base)
    run = lab.run(base=base, max_steps=20)
    assert sum(run.losses[-3:]) < sum(run.losses[:3])
    assert_equal(lab.weights(run.model), pristine)


@pytest.mark.parametrize("norm", [0.0, 1e-3])
def test_gradients_are_clipped_as_asked(lab, norm):
    seen = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
            seen.append(float(torch.stack(squares).sum().sqrt()))

    lab.run(max_steps=3, max_grad_norm=norm, trainer={"callbacks": [Norms()]})
    assert all(value <= 1.01e-3 for value in seen) == bool(norm)


def test_training_again_goes_on_from_where_it_was(lab, assert_equal):
    """The random start is a placeholder that a first reselection replaces; what was trained is not.

    SpIEL's own trainer dropped all trained deltas when a run was continued.
    """
    base = lab.base()
    pristine = lab.weights(base)
    trainer = lab.trainer(base=base)
    trainer.train()
    first = trainer.sparse_callback.replaced
    count = sum(t.numel() for n, t in lab.deltas(trainer.model).items() if "values" in n)
    assert first[2] == count
    trainer.train()
    second = trainer.sparse_callback.replaced
    assert sorted(second) == [2, 6, 10]
    assert 0 < second[2] < count / 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] < 4.1
    assert_equal(lab.weights(trainer.model), pristine)


def test_a_continued_run_resumes_to_the_same_bits(lab, assert_equal):
    """Whether the start was a placeholder is part of what a checkpoint remembers."""

    def continued(out, resume=None, **more):
        model = lab.adapted(init_weights=False)
        return lab.run(out, resume, model=model, **more)

    whole = continued("whole", save_strategy="steps", save_steps=1)
    count = sum(t.numel() for n, t in lab.deltas(whole.model).items() if "values" in n)
    assert whole.replaced[2] < count / 2
    resumed = continued("whole", lab.checkpoint("whole", 1))
    assert resumed.replaced == whole.replaced
    assert_equal(lab.deltas(whole.model), lab.deltas(resumed.model))


def test_a_peft_config_wraps_the_model(lab):
    from sft import SparseTrainer, SpielConfig

    config = SpielConfig(density=0.05, task_type="CAUSAL_LM")
    trainer = SparseTrainer(
        lab.base(), lab.arguments("run"), train_dataset=lab.dataset(), peft_config=config
    )
    trainer.train()
    assert trainer.model.peft_config["default"] is config
    assert trainer.sparse_callback.replaced


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_without_a_sparse_adapter_it_is_a_trainer(lab, assert_equal, kind):
    from peft import LoraConfig, get_peft_model

    def run(cls, out, resume=None):
        model = lab.base()
        if kind == "lora":
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
        trainer = lab.trainer(out, model=model, cls=cls, save_strategy="steps", save_steps=6)
        trainer.train(resume_from_checkpoint=resume)
        assert not (lab.folder / out / "checkpoint-6" / "sft_state.json").exists()
        return dict(trainer.model.state_dict())

    theirs = run(Trainer, "theirs")
    ours = run(None, "ours")
    assert_equal(ours, theirs)
    assert_equal(run(None, "ours", True), theirs)
    assert_equal(run(None, "ours", lab.checkpoint("ours", 6)), theirs)
