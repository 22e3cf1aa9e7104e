"""The log of a run: what stands in it, and that a resumed run repeats nothing."""

from __future__ import annotations

import json

import pytest
from transformers import Trainer, TrainerCallback

from sft import SoRAConfig, SpielConfig
from sft.report.lines import keep_until, read_lines, to_line


def spiel(**fields):
    given = {"density": 0.05, "reselect_every": 2, "window": 1, "task_type": "CAUSAL_LM"}
    return SpielConfig(**given | fields)


def losses(lines):
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def events(lines, name):
    return [line for line in lines if line.get("event") == name]


def test_every_log_of_the_trainer_is_a_line(trainer, log):
    built = trainer(spiel(), eval_strategy="steps", eval_steps=3)
    built.train()
    lines = read_lines(log)
    assert [line["event"] for line in lines if "event" in line][:1] == ["began"]
    logged = [(e["step"], e["loss"]) for e in built.state.log_history if "loss" in e]
    assert losses(lines) == logged
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert events(lines, "ended")[0]["train_loss"] == built.state.log_history[-1]["train_loss"]
    trained = [line for line in lines if "loss" in line]
    assert [line["tokens"] for line in trained] == [48, 96, 144]  # 2 updates of 4 rows of 6
    for line in trained:
        assert line["peak_memory"] > 1e6
        speed = line["tokens_per_second"] * 2 * line["seconds_per_update"]
        assert speed == pytest.approx(48, rel=0.02)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_supports_that_move_are_told_by_module(trainer, log):
    built = trainer(spiel())
    built.train()
    found = events(read_lines(log), "reselected")
    replaced = built.sparse_callback.replaced
    assert {line["step"]: line["moved"] for line in found} == replaced != {}
    for line in found:
        assert sum(line["modules"].values()) == line["moved"]
        assert line["moved"] + line["kept"] == sum(
            len(p) for n, p in built.model.named_parameters() if "delta_values" in n
        )
    assert "model.layers.0.self_attn.q_proj" in found[0]["modules"]


def test_ranks_that_close_are_told_once(trainer, log):
    config = SoRAConfig(r=4, strength=30.0, gate_learning_rate=0.05, task_type="CAUSAL_LM")
    built = trainer(config, logging_steps=1)
    built.train()
    lines = read_lines(log)
    found = events(lines, "ranks")
    totals = {line["step"]: sum(line["ranks"].values()) for line in found}
    logged = {line["step"]: line["sora_ranks"] for line in lines if "sora_ranks" in line}
    assert totals.items() <= logged.items()
    assert len(totals) > 1
    assert list(totals.values()) == sorted(totals.values(), reverse=True)
    assert len(set(totals.values())) == len(totals)


def test_a_stock_trainer_and_a_whole_model_have_a_log(trainer, log):
    trainer(cls=Trainer, include_num_input_tokens_seen="no").train()
    lines = read_lines(log)
    assert [step for step, _ in losses(lines)] == [2, 4, 6]
    assert not any("tokens" in line or "tokens_per_second" in line for line in lines)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 5


def test_a_resumed_run_goes_on_behind_its_checkpoint(trainer, log):
    settings = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    trainer(spiel(), **settings).train()
    whole = read_lines(log)
    cut = trainer(spiel(), **settings)
    cut.add_callback(Stop())
    cut.train()
    assert [step for step, _ in losses(read_lines(log))] == [1, 2, 3, 4, 5]
    trainer(spiel(), **settings).train(resume_from_checkpoint=str(log.parent / "checkpoint-3"))
    lines = read_lines(log)
    assert losses(lines) == losses(whole)
    for key in ("moved", "modules"):
        moved = [line[key] for line in events(lines, "reselected")]
        assert moved == [line[key] for line in events(whole, "reselected")]
    assert len(events(lines, "ended")) == len(events(lines, "resumed")) == 1
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_a_new_run_begins_a_new_log(trainer, log):
    for _ in range(2):
        trainer(spiel()).train()
    assert [step for step, _ in losses(read_lines(log))] == [2, 4, 6]


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    path.write_text("".join(map(to_line, whole)) + '{"step": 4, "lo')
    assert read_lines(path) == whole
    assert keep_until(path, 2) == whole[:2]
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole[:2]


def test_numbers_that_json_does_not_know_are_null():
    assert json.loads(to_line({"loss": float("nan"), "n": 3})) == {"loss": None, "n": 3}
