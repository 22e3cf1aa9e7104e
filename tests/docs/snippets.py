"""The code blocks of a page: found, and run one after another as its reader would."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"^```(?P<language>\w+)\n(?P<shown>.*?)^```$|<!-- before:(?P<hidden>.*?)-->"
    r"|<!-- elsewhere: (?P<elsewhere>\S+) -->",
    re.MULTILINE | re.DOTALL,
)
# what a command is given besides what the page says: a run of a few updates shows that it works
SHORT = ["training.max_steps=2", "evaluation.num_examples=2", "evaluation.max_new_tokens=2"]
RUNS = {  # besides those that are named like a shipped recipe
    "my": ["my.yaml"],
    "mezo_lora": ["mezo", "method={name: lora, r: 4}"],
}
ELSEWHERE = {"make", "pip", "torchrun", "python", "git", "uv", "vllm", "axolotl", "llama-server"}


@dataclass(frozen=True)
class Snippet:
    """One block of a page."""

    line: int
    language: str
    code: str


def snippets(page: str) -> Iterator[Snippet]:
    """Yield the blocks of a page.

    A comment `<!-- before: code -->` is Python that is not shown; `<!-- elsewhere: FILE -->` says
    that the next block is run by that file of tests, which has to exist.
    """
    elsewhere = False
    for found in FENCE.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        if found["elsewhere"]:
            elsewhere = True
            if not (ROOT / found["elsewhere"]).is_file():
                raise ValueError(f"line {line}: {found['elsewhere']}: no such file")
        elif found["hidden"] is not None:
            yield Snippet(line, "python", found["hidden"])
        else:
            language = "compiled" if elsewhere else found["language"]
            yield Snippet(line, language, found["shown"])
            elsewhere = False


def run(snippet: Snippet, names: dict[str, Any]) -> None:
    """Run a block; what it defines stays in `names` for the next ones of its page.

    Args:
        snippet: Python is executed, commands of ours are called, YAML is laid over a recipe and
            checked, JSON Lines and other data are read. `text` is left alone.
        names: of the page's Python so far.
    """
    ways = {
        "python": _python,
        "compiled": _compiled,
        "bash": _bash,
        "yaml": _yaml,
        "json": _json,
        "jsonl": _json,
        "text": lambda *_: None,
    }
    ways[snippet.language](snippet, names)


def _python(snippet: Snippet, names: dict[str, Any]) -> None:
    lines = "\n" * snippet.line  # so that a traceback names the line of the page
    exec(compile(lines + snippet.code, names["__page__"], "exec"), names)


def _compiled(snippet: Snippet, names: dict[str, Any]) -> None:
    compile(snippet.code, names["__page__"], "exec")


def _bash(snippet: Snippet, names: dict[str, Any]) -> None:
    for line in snippet.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        if words and words[0] == "sft":
            call(words[1:])
        elif words and words[0] not in ELSEWHERE:
            raise ValueError(f"{line!r}: no command of ours, nor one that is left alone")


def call(words: list[str]) -> None:
    """Run a command of ours, in this process.

    Raises:
        RuntimeError: it did not end well.
    """
    from typer.testing import CliRunner

    from sft.cli import app

    for word in words:
        _prepare(word)
    _make_room(words)
    if "--until" in words:
        words[words.index("--until") + 1] = "1"
    if "--processes" in words:
        at = words.index("--processes")
        words = [*words[:at], *words[at + 2 :], "--dry-run"]
    if words[0] == "train" and "--dry-run" not in words:
        own = {word.partition("=")[0] for word in words}
        added = [pair for pair in SHORT if pair.partition("=")[0] not in own]
        words += [*added, *([] if "overwrite=true" in words else ["overwrite=true"])]
    with contextlib.redirect_stderr(None):
        done = CliRunner().invoke(app, words, catch_exceptions=True)
    if done.exit_code:
        raise RuntimeError(
            f"sft {' '.join(words)}: {done.exit_code}: {done.output}{done.exception}"
        )


def _make_room(words: list[str]) -> None:
    """Remove what an earlier command left where this one writes."""
    flags = [i for i, word in enumerate(words) if word in ("--to", "--out")]
    written = [Path(words[i + 1]) for i in flags]
    written += [Path(words[-1])] if words[:2] == ["recipes", "copy"] else []
    for path in written:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def _prepare(word: str) -> None:
    """Make the run that a page takes for done: `runs/NAME` is left by the recipe of that name."""
    path = Path(word).parts[:2]
    if len(path) == 2 and path[0] == "runs" and not Path(*path, "run.json").exists():
        job = RUNS.get(path[1], [path[1]])
        call(["train", *job, f"training.output_dir={'/'.join(path)}"])


def _yaml(snippet: Snippet, names: dict[str, Any]) -> None:
    """Check keys and values by laying them over a recipe that works."""
    import yaml

    from sft.recipe.load import resolve
    from sft.recipe.source import read

    given = yaml.safe_load(snippet.code)
    whole = {"model", "method", "data"} <= given.keys()
    path = Path("snippet.yaml")
    base = {} if whole else yaml.safe_load(Path("base.yaml").read_text(encoding="utf-8"))
    if "method" in given:
        base.pop("method", None)
    path.write_text(yaml.safe_dump(_laid_over(base, given)), encoding="utf-8")
    resolve(read(path), "snippet")


def _laid_over(base: Any, given: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(given, dict)):
        return given
    return {**base, **{key: _laid_over(base.get(key), value) for key, value in given.items()}}


def _json(snippet: Snippet, names: dict[str, Any]) -> None:
    import json

    for line in snippet.code.splitlines() if snippet.language == "jsonl" else [snippet.code]:
        json.loads(line)
