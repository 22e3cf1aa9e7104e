"""A script for stock TRL trains sparsely by one other import and one other argument."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NAMES = ["SFT", "DPO", "GRPO", "Reward"]


def trl(name):
    import trl

    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def ours(name):
    import sft

    return getattr(sft, f"Sparse{name}Trainer")


def model_of(name, llama):
    from transformers import LlamaForSequenceClassification

    if name != "Reward":
        return llama()
    torch.manual_seed(0)
    return LlamaForSequenceClassification(llama(num_labels=1).config)


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", NAMES)
def test_a_stock_script_changes_one_import_and_one_argument(train, llama, name):
    from sft import SpielConfig

    stock, config_class = trl(name)
    task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    lora = LoraConfig(r=4, task_type=task)
    train(stock, config_class, model_of(name, llama), peft_config=lora, out="stock").train()

    spiel = SpielConfig(density=0.1, reselect_every=2, window=1, task_type=task)
    base = {n: p.clone() for n, p in model_of(name, llama).named_parameters()}
    trainer = train(ours(name), config_class, model_of(name, llama), peft_config=spiel)
    trainer.train()
    moved = [n for n, p in trained(trainer.model).items() if "delta_values" in n and p.any()]
    assert moved
    assert sorted(trainer.sparse_callback.replaced) == [1, 3] or trainer.sparse_callback.replaced
    kept = {
        n.replace(".base_layer", ""): p
        for n, p in trainer.model.get_base_model().named_parameters()
    }
    for key, value in base.items():
        if key in kept:  # a new head is trained, beside the one it was
            assert torch.equal(kept[key], value), key


@pytest.mark.parametrize("given", ["new", "trained"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_in_the_same_bits(train, llama, method_config, tmp_path, name, given):
    _, config_class = trl(name)
    settings = {"task_type": "SEQ_CLS"} if name == "Reward" else {}
    beta = {"beta": 0.1} if name == "GRPO" else {}
    start = method_config("spiel", init_weights=given == "new", **settings)
    get_peft_model(model_of(name, llama), start).save_pretrained(tmp_path / "start")

    def run(resume=None):
        base = model_of(name, llama)
        model = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
        if resume is None and given == "new":
            model = get_peft_model(model_of(name, llama), method_config("spiel", **settings))
        trainer = train(
            ours(name), config_class, model, save_strategy="steps", save_steps=2, **beta
        )
        trainer.train(resume_from_checkpoint=resume)
        return trained(trainer.model)

    whole = run()
    resumed = run(str(tmp_path / "run" / "checkpoint-2"))
    assert whole.keys() == resumed.keys() and whole
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_one_line_makes_a_trainer_of_ones_own_sparse(llama, method_config, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from sft import SparseTrainingMixin

    class Mine(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return 2 * super().compute_loss(model, inputs, *args, **kwargs)

    class Sparse(SparseTrainingMixin, Mine):
        pass

    ids = [[i % 60 + 1 for i in range(n, n + 8)] for n in range(16)]
    trainer = Sparse(
        model=get_peft_model(llama(), method_config("spiel")),
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=4, report_to=[], disable_tqdm=True,
            save_strategy="no", learning_rate=1e-2,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )  # fmt: skip
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "SparseAdamW"
    assert trainer.sparse_callback.replaced
    for name, parameter in llama().named_parameters():
        where = name.replace(".weight", ".base_layer.weight")
        held = dict(trainer.model.get_base_model().named_parameters())
        assert torch.equal(held.get(where, held.get(name)), parameter)
