"""TRL's trainers, trained by forward passes alone."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import PrinterCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from sft import SparseTrainingMixin, SpielConfig, ZerothOrderConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PROMPTS = ["one two three ->", "two three four ->", "three four five ->", "four five six ->"]
PAIRS = {"prompt": PROMPTS * 2, "chosen": [" seven"] * 8, "rejected": [" six"] * 8}
ROWS = {
    "sft": {"prompt": PROMPTS * 4, "completion": [" seven", " six", " five", " four"] * 4},
    "dpo": PAIRS,
    "reward": PAIRS,
    "grpo": {"prompt": PROMPTS * 2},
}


class SFT(SparseTrainingMixin, SFTTrainer):
    pass


class DPO(SparseTrainingMixin, DPOTrainer):
    pass


class Reward(SparseTrainingMixin, RewardTrainer):
    pass


class GRPO(SparseTrainingMixin, GRPOTrainer):
    pass


TRAINERS = {
    "sft": (SFT, SFTConfig),
    "dpo": (DPO, DPOConfig),
    "reward": (Reward, RewardConfig),
    "grpo": (GRPO, GRPOConfig),
}


def letters(completions, **_):
    return [float(len(str(text))) for text in completions]


@pytest.fixture
def run(lab, tiny_tokenizer):
    def run(name, model, out="run", trainer=None, **settings):
        cls, owner = TRAINERS[name]
        arguments = {
            "use_cpu": True, "bf16": False, "max_steps": 4, "per_device_train_batch_size": 4,
            "learning_rate": 1e-3, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
            "save_strategy": "no",
        }  # fmt: skip
        given = {"zeroth_order": ZerothOrderConfig(eps=1e-2)} | (trainer or {})
        if name == "grpo":
            arguments |= {"num_generations": 2, "max_completion_length": 4}
            given["reward_funcs"] = letters
        built = cls(
            model=model,
            args=owner(str(lab.folder / out), **arguments | settings),
            train_dataset=Dataset.from_dict(ROWS[name]),
            processing_class=tiny_tokenizer,
            **given,
        )
        built.remove_callback(PrinterCallback)
        built.train()
        return built

    return run


def model_of(lab, name, *, adapted=False):
    cls = "LlamaForSequenceClassification" if name == "reward" else "LlamaForCausalLM"
    extra = {"num_labels": 1} if name == "reward" else {}
    base = lab.base(cls, eos_token_id=1, **extra)
    if not adapted:
        base.save_pretrained(lab.folder / "base")  # where DPOTrainer takes its reference from
        return type(base).from_pretrained(lab.folder / "base", dtype=torch.float32)
    task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
    return get_peft_model(base, SpielConfig(density=0.1, growth="none", task_type=task))


def gradients(trainer) -> list[float]:
    return [g for row in trainer.optimizer.optimizer.log.rows for g in row.gradients]


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_gets_a_direction_and_moves_along_it(lab, run, name, adapted) -> None:
    model = model_of(lab, name, adapted=adapted)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    more = {"num_iterations": 2} if name == "grpo" else {}
    trainer = run(name, model, **more)
    assert any(g != 0 for g in gradients(trainer))
    after = dict(trainer.model.named_parameters())
    moved = {n for n, p in before.items() if not torch.equal(p, after[n])}
    assert moved and moved <= trained


def test_preferences_start_from_the_reference(lab, run) -> None:
    trainer = run("dpo", model_of(lab, "dpo", adapted=True))
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=2e-2)


def test_a_second_evaluation_counts_nothing_twice(lab, run) -> None:
    first_order = run("sft", model_of(lab, "sft"), "a", trainer={"zeroth_order": None})
    zeroth = run("sft", model_of(lab, "sft"), "b")
    for a, b in zip(first_order.state.log_history, zeroth.state.log_history, strict=True):
        assert a.get("num_tokens") == b.get("num_tokens")
        assert ("entropy" in a) == ("entropy" in b)
    assert "num_tokens" in zeroth.state.log_history[0]


def test_a_policy_loss_of_constant_value_is_refused_with_its_remedy(lab, run) -> None:
    with pytest.raises(ValueError, match=r"num_iterations: on fresh samples .* set num_iterations"):
        run("grpo", model_of(lab, "grpo"))
