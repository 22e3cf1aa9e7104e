"""What a run came to, in a few figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sft.report.curves import points
from sft.report.folder import RunFolder, Section
from sft.report.numbers import count, duration, figure, percent, size


@dataclass(frozen=True)
class Fact:
    """A figure of a run, what it is, and what stands beside it."""

    name: str
    value: str
    note: str = ""


def title(run: RunFolder) -> str:
    """Return what was trained, how, and on what."""
    method, task = run.part("method").get("name"), run.recipe.get("task")
    named = task.get("name") if isinstance(task, dict) else task
    model = run.part("model").get("name")
    data = run.part("data").get("train")
    shown = data if isinstance(data, str) else None
    words = [method or "training", f"of {model}" if model else "", f"on {shown}" if shown else ""]
    if named not in (None, "sft"):
        words.append(f"({named})")
    return " ".join(word for word in words if word)


def metrics(run: RunFolder) -> list[Fact]:
    """Return the metrics after training, with those of before."""
    before, after = dict(run.section("before")), dict(run.section("after"))
    for name, values in run.section("also").items():  # other data, judged as well
        before[name], after[name] = values
    return [
        Fact(
            name.replace("_", " "),
            figure(value),
            f"was {figure(before[name])}" if name in before else "",
        )
        for name, value in after.items()
    ]


def facts(run: RunFolder) -> list[Fact]:
    """Return the other headline figures."""
    return [*_trained(run.record), *_course(run), *_ends(run)]


def phases(run: RunFolder) -> list[tuple[str, str, float]]:
    """Return the phases of a run, their time, and their share of the longest."""
    seconds: dict[str, float] = run.section("seconds")
    longest = max(seconds.values(), default=0) or 1
    return [(name, duration(took), took / longest) for name, took in seconds.items()]


def status(run: RunFolder) -> str:
    """Return what there is to say of a run that did not end, else nothing."""
    if run.record:
        return ""
    last = max((line["step"] for line in run.lines), default=0)
    return f"This run has not ended, or was cut short: its log reaches update {last:,}."


def _trained(record: Section) -> Iterable[Fact]:
    trained, weights = record.get("trained_weights"), record.get("all_weights")
    if trained and weights:
        note = f"{percent(trained / weights)} of {count(weights)}"
        yield Fact("weights trained", count(trained), note)


def _course(run: RunFolder) -> Iterable[Fact]:
    losses, speeds = points(run.lines, "loss"), _numbers(run, "tokens_per_second")
    steps = run.record.get("steps") or (losses[-1][0] if losses else 0)
    tokens = _numbers(run, "tokens")
    if steps:
        note = f"{count(tokens[-1])} tokens" if tokens else ""
        yield Fact("updates", f"{steps:,.0f}", note)
    if len(losses) > 1:
        yield Fact("training loss", figure(losses[-1][1]), f"was {figure(losses[0][1])}")
    if speeds:
        middle = sorted(speeds)[len(speeds) // 2]
        yield Fact("tokens per second", count(middle), "median, of updates alone")
    if memory := _numbers(run, "peak_memory"):
        yield Fact("peak memory", size(max(memory)), "while training")


def _ends(run: RunFolder) -> Iterable[Fact]:
    seconds = run.section("seconds")
    if seconds:
        note = f"{duration(seconds['train'])} of it training" if "train" in seconds else ""
        yield Fact("time", duration(sum(seconds.values())), note)
    difference = run.record.get("max_logit_difference")
    if difference is not None:
        yield Fact("merged model", f"± {figure(difference)}", "largest difference of a logit")


def _numbers(run: RunFolder, key: str) -> list[float]:
    found: list[Any] = [line.get(key) for line in run.lines]
    return [float(value) for value in found if isinstance(value, int | float)]
