"""Training progress: one live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressReport(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Show step, loss, learning rate, tokens/s and time left.

    Takes the place of transformers' own bars and dict lines. Tokens are counted by the trainer
    (`include_num_input_tokens_seen`); without that the speed is left out. What the log holds under
    `prefix`, such as SoRA's ranks, is shown after the loss.
    """

    def __init__(
        self, console: Console | None = None, *, live: bool | None = None, prefix: str | None = None
    ) -> None:
        self.prefix = prefix
        self.console = console or Console()
        self.live = self.console.is_terminal if live is None else live
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.shown: dict[str, Any] = {"loss": "-", "lr": "-", "more": ""}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock, and the bar."""
        self.began, self.first_step = time.monotonic(), state.global_step
        self.first_token = state.num_input_tokens_seen
        if not (self.live and state.is_world_process_zero):
            return
        text = "step {task.completed}/{task.total}"
        tail = "loss {task.fields[loss]}  lr {task.fields[lr]}{task.fields[more]}"
        tail += "  {task.fields[speed]}"
        columns = (TextColumn(text), BarColumn(30), TextColumn(tail), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console)
        self.task = self.bar.add_task(
            "", total=state.max_steps, completed=state.global_step, speed="", **self.shown
        )
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            speed = self._speed(state)
            self.bar.update(self.task, completed=state.global_step, speed=speed, **self.shown)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take up the latest loss; without a terminal, print it."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self.shown = {
            "loss": f"{logs['loss']:.3f}",
            "lr": f"{logs.get('learning_rate', 0):.2e}",
            "more": self._more(logs),
        }
        if self.bar is None:
            step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            shown = f"loss {self.shown['loss']}  lr {self.shown['lr']}{self.shown['more']}"
            left = f"{self._seconds_left(state):.0f} s left"
            line = f"  {step}  {shown}  {self._speed(state)}  {left}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar down."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; also called when training ends with an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _more(self, logs: dict[str, Any]) -> str:
        """Return what the method logs, each after two spaces."""
        if self.prefix is None:
            return ""
        found = {
            k.removeprefix(self.prefix): v for k, v in logs.items() if k.startswith(self.prefix)
        }
        return "".join(f"  {name.replace('_', ' ')} {value:.4g}" for name, value in found.items())

    def _speed(self, state: Any) -> str:
        """Return tokens per second since training began in this process."""
        tokens = state.num_input_tokens_seen - self.first_token
        seconds = time.monotonic() - self.began
        return f"{tokens / seconds:.0f} tok/s" if tokens and seconds else ""

    def _seconds_left(self, state: Any) -> float:
        """Extrapolate the mean step time of this process."""
        done = max(state.global_step - self.first_step, 1)
        left = state.max_steps - state.global_step
        return float((time.monotonic() - self.began) / done * left)
