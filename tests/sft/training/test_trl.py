"""TRL's trainers: the mix-in before them, or the callback in them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from sft.adapters.registry import config_class, method_names

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TEXT = ["one two three ->", "two three four ->", "three four five ->", "four five six ->"]


@pytest.fixture
def trl_arguments(lab):
    def build(config_class, out, **settings):
        defaults = {
            "use_cpu": True,
            "bf16": False,
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        return config_class(str(lab.folder / out), **defaults | settings)

    return build


@pytest.fixture
def sft_trainer(lab, tiny_tokenizer, trl_arguments):
    """Build an SFTTrainer, TRL's own or one with the mix-in."""

    def build(out, cls, **more):
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import SFTConfig

        given = {"model": lab.base(eos_token_id=1)} | more.pop("trainer", {})
        rows = {"prompt": TEXT * 4, "completion": [" seven", " six", " five", " four"] * 4}
        trainer = cls(
            args=trl_arguments(SFTConfig, out, **more),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tiny_tokenizer,
            **given,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return build


def test_the_mixin_trains_and_resumes_to_the_same_bits(lab, assert_equal, sft_trainer):
    from trl import SFTTrainer

    from sft import SparseTrainingMixin

    class SparseSFT(SparseTrainingMixin, SFTTrainer):
        pass

    def run(out, resume=None, **more):
        base = lab.base(eos_token_id=1)
        trainer = sft_trainer(out, SparseSFT, trainer={"model": lab.adapted(base)}, **more)
        pristine = lab.weights(base)
        trainer.train(resume_from_checkpoint=resume)
        assert_equal(lab.weights(trainer.model), pristine)
        return trainer

    whole = run("whole", save_strategy="steps", save_steps=5)
    assert sorted(whole.sparse_callback.replaced) == [2, 6, 10]
    assert type(whole.optimizer.optimizer).__name__ == "SparseAdamW"
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    resumed = run("whole", lab.checkpoint("whole", 5))
    assert sorted(resumed.sparse_callback.replaced) == [6, 10]
    assert_equal(lab.deltas(whole.model), lab.deltas(resumed.model))
    assert_equal(lab.optimizer_state(whole.optimizer), lab.optimizer_state(resumed.optimizer))


def test_a_stock_sft_trainer_takes_config_and_callback(lab, assert_equal, sft_trainer):
    from trl import SFTTrainer

    from sft import SparseCallback, SpielConfig

    callback = SparseCallback()
    base = lab.base(eos_token_id=1)
    pristine = lab.weights(base)
    config = SpielConfig(density=0.05, reselect_every=4, window=2, task_type="CAUSAL_LM")
    trainer = sft_trainer(
        "run", SFTTrainer, trainer={"model": base, "peft_config": config, "callbacks": [callback]}
    )
    trainer.train()
    assert sorted(callback.replaced) == [2, 6, 10]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert_equal(lab.weights(trainer.model), pristine)


def test_preferences_train_too(lab, assert_equal, tiny_tokenizer, trl_arguments):
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from sft import SparseTrainingMixin, SpielConfig

    class SparseDPO(SparseTrainingMixin, DPOTrainer):
        pass

    base = lab.base(eos_token_id=1)
    pristine = lab.weights(base)
    rows = {"prompt": TEXT * 2, "chosen": [" seven"] * 8, "rejected": [" six"] * 8}
    trainer = SparseDPO(
        model=base,
        peft_config=SpielConfig(density=0.1, reselect_every=4, window=2, task_type="CAUSAL_LM"),
        args=trl_arguments(DPOConfig, "run", max_steps=8),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # the reference is the base: at the first update policy and reference agree
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-4)
    assert losses[-1] < losses[0]
    assert sorted(trainer.sparse_callback.replaced) == [2, 6]
    assert_equal(lab.weights(trainer.model), pristine)


@pytest.mark.parametrize("method", method_names())
def test_a_trained_adapter_is_its_own_reference(lab, tiny_tokenizer, trl_arguments, method):
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from sft import SparseTrainingMixin

    class SparseDPO(SparseTrainingMixin, DPOTrainer):
        pass

    owner = config_class(method)
    shared = {"density": 0.1} if "density" in {f.name for f in fields(owner)} else {}
    config = owner(task_type="CAUSAL_LM", init_weights=False, **shared)
    model = get_peft_model(lab.base(eos_token_id=1), config)
    rows = {"prompt": TEXT * 2, "chosen": [" seven"] * 8, "rejected": [" six"] * 8}
    trainer = SparseDPO(
        model=model,
        args=trl_arguments(DPOConfig, "run", max_steps=1),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # at the first update policy and reference agree
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)


@pytest.mark.parametrize("method", method_names())
def test_every_method_goes_through_trls_peft_config(lab, sft_trainer, method):
    from trl import SFTTrainer

    from sft import SparseTrainingMixin

    class SparseSFT(SparseTrainingMixin, SFTTrainer):
        pass

    owner = config_class(method)
    shared = {"density": 0.1} if "density" in {f.name for f in fields(owner)} else {}
    config = owner(task_type="CAUSAL_LM", **shared)
    trainer = sft_trainer("run", SparseSFT, trainer={"peft_config": config}, max_steps=4)
    trainer.train()
    prefix = trainer.model.base_model.prefix
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all(f".{prefix}" in name for name in trained)
    assert any(p.any() for name, p in trainer.model.named_parameters() if name in trained)
