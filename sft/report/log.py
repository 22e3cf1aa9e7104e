"""`log.jsonl`: what a Trainer logs, and how supports and ranks change, a line each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback

from sft.report.lines import keep_until, to_line
from sft.report.memory import peak_memory
from sft.report.observe import Observer
from sft.run.folder import LOG


class RunLog(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Writes `output_dir/log.jsonl` beside a training run; works in any Trainer.

        Trainer(model=model, args=args, train_dataset=rows, callbacks=[RunLog()]).train()

    A line holds the step, the time, the seconds of training so far, the tokens seen, tokens/s of
    the updates since the last such line, the peak of memory, and all that was logged. Lines with an
    `event` tell of a support that moved (`reselected`) and of ranks that closed (`ranks`), by
    module. A resumed run goes on behind the lines of its checkpoint: none is there twice.

    Tokens are the Trainer's (`include_num_input_tokens_seen`) or TRL's (`num_tokens`); without
    either, what is told of tokens is left out.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._observer: Observer | None = None
        self._updates = _Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the log, and drop the lines of updates that are made again."""
        self._observer, self._updates = None, _Clock(state.num_input_tokens_seen)
        self._began, self._device = time.monotonic(), args.device
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = keep_until(path, state.global_step)
        self._began -= earlier[-1].get("seconds", 0.0) if earlier else 0.0
        self._file = path.open("a", encoding="utf-8")
        self._write(state, {"event": "resumed" if state.global_step else "began"})

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Look at what the last update left, and start the clock of the next one."""
        if self._observer is None:  # supports that batches choose are in place by now
            self._observer = Observer(model)
        self._observe(state)
        self._updates.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock of an update."""
        self._updates.stop()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write what is logged."""
        if not logs:
            return
        self._observe(state)
        if self._observer is not None and (ranks := self._observer.changed_ranks()):
            self._write(state, {"event": "ranks", "ranks": ranks})
        found = {k: v for k, v in logs.items() if k not in ("num_input_tokens_seen", "num_tokens")}
        counted = state.num_input_tokens_seen or logs.get("num_tokens", 0)
        if "loss" in logs:
            found |= self._updates.speeds(int(counted))
        if "train_loss" in logs:
            found["event"] = "ended"
        self._write(state, {"tokens": int(counted), **found} if counted else found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the log."""
        self._observe(state)
        if self._file is not None:
            self._file.close()
        self._file, self._observer = None, None

    def _observe(self, state: Any) -> None:
        """Write which supports moved since the last look."""
        moved = {} if self._observer is None else self._observer.moved()
        if moved:
            count, of = sum(moved.values()), sum(self._observer.sizes.values())  # type: ignore[union-attr]
            event = {"event": "reselected", "moved": count, "kept": of - count, "modules": moved}
            self._write(state, event)

    def _write(self, state: Any, content: dict[str, Any]) -> None:
        if self._file is None:
            return
        now = {"time": time.time(), "seconds": round(time.monotonic() - self._began, 3)}
        epoch = {} if state.epoch is None else {"epoch": state.epoch}
        memory = {} if "event" in content else {"peak_memory": peak_memory(self._device)}
        line = {"step": state.global_step, **now, **epoch, **content, **memory}
        self._file.write(to_line(line))
        self._file.flush()  # a run that is killed has its log


class _Clock:
    """Counts the seconds that updates take; evaluations and checkpoints lie between them."""

    def __init__(self, tokens: int = 0) -> None:
        self.seconds, self.updates, self.tokens = 0.0, 0, tokens
        self._began: float | None = None

    def start(self) -> None:
        self._began = time.monotonic()

    def stop(self) -> None:
        if self._began is not None:
            self.seconds += time.monotonic() - self._began
            self.updates, self._began = self.updates + 1, None

    def speeds(self, tokens: int) -> dict[str, float]:
        """Return seconds of an update, and tokens/s, since they were asked for last."""
        found = {}
        if self.updates and self.seconds:
            found["seconds_per_update"] = round(self.seconds / self.updates, 4)
            if tokens > self.tokens:
                found["tokens_per_second"] = round((tokens - self.tokens) / self.seconds, 1)
        self.seconds, self.updates, self.tokens = 0.0, 0, tokens
        return found
