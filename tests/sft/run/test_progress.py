from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from sft.run.phases import Phases
from sft.run.progress import ProgressReport


@pytest.fixture
def state():
    return SimpleNamespace(
        global_step=0, max_steps=10, num_input_tokens_seen=0, is_world_process_zero=True
    )


def train(console, state, steps=3):
    report = ProgressReport(console)
    report.on_train_begin(None, state, None)
    for _ in range(steps):
        state.global_step += 1
        state.num_input_tokens_seen += 100
        report.on_step_end(None, state, None)
        report.on_log(None, state, None, logs={"loss": 1.5, "learning_rate": 1e-3})
    report.on_step_end(None, state, None)
    report.on_train_end(None, state, None)
    return console.file.getvalue()


def test_without_a_terminal_each_log_is_a_line(state):
    lines = train(Console(file=io.StringIO()), state).splitlines()
    assert len(lines) == 3
    assert "step  3/10  loss 1.500  lr 1.00e-03" in lines[-1]
    assert "tok/s" in lines[-1]
    assert lines[-1].endswith("s left")


def test_a_terminal_gets_one_live_bar(state):
    shown = train(Console(file=io.StringIO(), force_terminal=True, width=120), state)
    for part in ("step 3/10", "loss 1.500", "lr 1.00e-03", "tok/s"):
        assert part in shown


def test_what_the_method_logs_stands_after_the_loss(state):
    console = Console(file=io.StringIO())
    report = ProgressReport(console, prefix="sora_")
    report.on_train_begin(None, state, None)
    state.global_step = 1
    logs = {"loss": 1.5, "learning_rate": 1e-3, "sora_ranks": 812, "grad_norm": 3.0}
    report.on_log(None, state, None, logs=logs)
    assert "lr 1.00e-03  ranks 812" in console.file.getvalue()
    assert "norm" not in console.file.getvalue()


def test_other_logs_and_other_processes_are_silent(state):
    console = Console(file=io.StringIO())
    report = ProgressReport(console)
    report.on_train_begin(None, state, None)
    report.on_log(None, state, None, logs={"train_runtime": 1.0})
    state.is_world_process_zero = False
    report.on_log(None, state, None, logs={"loss": 1.0})
    assert console.file.getvalue() == ""


def test_a_resumed_run_counts_from_where_it_began(state):
    state.global_step, state.num_input_tokens_seen = 7, 10**9
    assert float(train(Console(file=io.StringIO()), state).split(" tok/s")[0].split()[-1]) < 1e7


def test_a_phase_prints_its_time_and_note_unless_it_fails():
    console = Console(file=io.StringIO())
    phases = Phases(console)
    with phases.phase("save"):
        phases.note("a [folder]")
    assert console.file.getvalue().startswith("save")
    assert console.file.getvalue().endswith(" s   a [folder]\n")
    with pytest.raises(RuntimeError), phases.phase("export"):
        raise RuntimeError
    assert list(phases.seconds) == ["save"]
