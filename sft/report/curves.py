"""The curves of a run, from the lines of its log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sft.report.charts import Chart, Point, Series
from sft.report.lines import Line
from sft.report.numbers import count, figure, percent

OWN = {"step", "time", "seconds", "tokens", "peak_memory", "epoch", "event", "total_flos"}
PERFORMANCE = {
    "learning_rate", "grad_norm", "tokens_per_second", "seconds_per_update",
}  # fmt: skip
SPEEDS = ("runtime", "per_second", "preparation_time", "flos")  # ends of names
HELD_OUT = "eval_"


def curves(
    lines: list[Line], before: Mapping[str, float] | None = None
) -> tuple[list[Chart], list[Chart], list[Chart]]:
    """Return charts: of loss and metrics, of what else was logged, of the course of training.

    Args:
        lines: of the log.
        before: metrics of held-out rows before the first update.
    """
    names = metric_names(lines)
    judged = [name for name in names if name == "loss" or has_points(lines, HELD_OUT + name)]
    others = [name for name in names if name not in judged]
    return (
        [_metric(lines, name, (before or {}).get(name)) for name in judged],
        [_metric(lines, name) for name in others],
        list(_course(lines)),
    )


def metric_names(lines: list[Line]) -> list[str]:
    """Return what the log measures, without "eval_"; the loss comes first."""
    found = {"loss": None} | {
        key.removeprefix(HELD_OUT): None
        for line in lines
        if "event" not in line
        for key, value in line.items()
        if _is_metric(key, value)
    }
    return [name for name in found if has_points(lines, name) or has_points(lines, HELD_OUT + name)]


def points(lines: Iterable[Line], key: str) -> list[Point]:
    """Return step and value of every line that has a number under a key."""
    return [
        (line["step"], float(line[key]))
        for line in lines
        if isinstance(line.get(key), int | float) and "event" not in line
    ]


def has_points(lines: Iterable[Line], key: str) -> bool:
    """Whether a line has a number under a key."""
    return bool(points(lines, key))


def _is_metric(key: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (key in OWN | PERFORMANCE or key.startswith("train_") or key.endswith(SPEEDS))


def _metric(lines: list[Line], name: str, before: float | None = None) -> Chart:
    """Return the chart of a metric: in training, on held-out rows, or both."""
    held_out = points(lines, HELD_OUT + name)
    if held_out and before is not None and held_out[0][0] > 0:
        held_out.insert(0, (0, before))
    found = {"training": points(lines, name), "held out": held_out}
    series = [Series(kind, values) for kind, values in found.items() if values]
    return Chart(_key(name), _title(name), series)


def _course(lines: list[Line]) -> Iterable[Chart]:
    """Yield how training went besides its metrics."""
    speed = "tokens_per_second" if has_points(lines, "tokens_per_second") else "seconds_per_update"
    shown: dict[str, tuple[str, Callable[[float], str], str]] = {
        "learning_rate": ("Learning rate", figure, ""),
        "grad_norm": ("Norm of the gradient", figure, "before clipping"),
        speed: (_title(speed), count if speed.startswith("tokens") else figure, "of updates alone"),
    }
    for key, (title, show, note) in shown.items():
        if values := points(lines, key):
            zero = key != "grad_norm"
            series = [Series(title.lower(), values)]
            yield Chart(_key(key), title, series, from_zero=zero, show=show, note=note)
    yield from memory(lines)
    yield from churn(lines)
    yield from ranks(lines)


def memory(lines: list[Line]) -> Iterable[Chart]:
    """Yield the peak of memory."""
    if held := points(lines, "peak_memory"):
        large = held[-1][1] >= 2**30
        series = [Series("peak memory", [(s, m / 2 ** (30 if large else 20)) for s, m in held])]
        note = "the most that was held up to an update"
        title = f"Peak memory, {'GiB' if large else 'MiB'}"
        yield Chart("peak_memory", title, series, from_zero=True, note=note)


def churn(lines: list[Line]) -> Iterable[Chart]:
    """Yield which share of the support each reselection moved."""
    moved = [
        (line["step"], line["moved"] / (line["moved"] + line["kept"]))
        for line in lines
        if line.get("event") == "reselected"
    ]
    if moved:
        note = f"share of the trained positions that are new, {len(moved)} times"
        series = [Series("new positions", moved)]
        yield Chart(
            "churn", "Support churn", series, bars=True, from_zero=True, show=percent, note=note
        )


def ranks(lines: list[Line]) -> Iterable[Chart]:
    """Yield how the ranks of the modules fall."""
    events = [(line["step"], list(line["ranks"].values())) for line in lines if "ranks" in line]
    if events:
        kinds: dict[str, Callable[[list[int]], float]] = {
            "mean": lambda r: sum(r) / len(r),
            "largest": max,
            "smallest": min,
        }
        series = [
            Series(kind, [(s, float(of(r))) for s, r in events]) for kind, of in kinds.items()
        ]
        yield Chart("ranks", "Open ranks of a module", series, from_zero=True)


def _title(name: str) -> str:
    """Return a name of the log as a title."""
    known = {"nll": "Negative log-likelihood", "tokens_per_second": "Tokens per second"}
    known |= {"forgetting_kl": "Forgetting: KL from the base"}
    text = known.get(name, name.replace("_", " ").replace("/", ": "))
    return text[:1].upper() + text[1:]


def _key(name: str) -> str:
    """Return a name that a file can have."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
