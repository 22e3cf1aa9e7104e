from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sft.evaluation.callback import MeasureOnEvaluate


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 48, (count, 6), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(llama, tmp_path, *, measured: bool):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, save_steps=2,
        logging_steps=1, report_to="none", use_cpu=True, save_strategy="steps", disable_tqdm=True,
        metric_for_best_model="eval_depth", greater_is_better=True,
    )  # fmt: skip
    data = rows(8)
    trainer = Trainer(model=llama(), args=arguments, train_dataset=data, eval_dataset=data[:4])
    said: list[str] = []
    if measured:
        values = iter([3.0, 2.0])

        def measure(model):
            assert model is trainer.model
            model.generate(input_ids=data[0]["input_ids"][None], max_new_tokens=2, pad_token_id=0)
            return {"depth": next(values)}

        trainer.add_callback(MeasureOnEvaluate(trainer, [measure], said.append))
    else:
        arguments.metric_for_best_model = "eval_loss"
    trainer.train()
    return trainer, said


def test_measures_are_logged_said_and_choose_the_best(llama, tmp_path):
    trainer, said = trained(llama, tmp_path, measured=True)
    logged = [e for e in trainer.state.log_history if "eval_depth" in e]
    assert [(entry["step"], entry["eval_depth"]) for entry in logged] == [(2, 3.0), (4, 2.0)]
    assert trainer.state.best_metric == 3.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert said[0].startswith("  step 2/4  eval_loss ")
    assert said[0].endswith("eval_depth 3")


def test_measuring_changes_no_step(llama, tmp_path):
    with_it, _ = trained(llama, tmp_path / "a", measured=True)
    without, _ = trained(llama, tmp_path / "b", measured=False)
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (with_it, without)
    ]
    assert losses[0] == losses[1] != []


def test_the_prefix_of_an_evaluation_is_kept(llama, tmp_path):
    trainer, _ = trained(llama, tmp_path, measured=False)
    trainer.add_callback(MeasureOnEvaluate(trainer, [lambda model: {"depth": 5.0}]))
    found = trainer.evaluate(metric_key_prefix="test")
    assert found["test_depth"] == 5.0
    assert found["test_loss"] == pytest.approx(found["test_loss"])
