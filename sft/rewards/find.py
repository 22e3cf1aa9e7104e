"""Reward functions by name, in the form that TRL calls them: lists of completions and columns."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import numbers
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sft.errors import UserError, one_line, unknown_name
from sft.rewards import builtin

Reward = Callable[..., list[float | None]]

REFERENCES = ("completion", "answer")  # columns that hold the right answer, if none is named
_COMPARED = {"exact_match": builtin.exact_match, "token_error_rate": builtin.token_error_rate}
NAMES = (*_COMPARED, "length", "format")


class RewardSpec(BaseModel):
    """One reward: its name, and how much it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1)
    weight: float = 1.0
    target: int | None = Field(default=None, gt=0, description="of length: words of a completion")
    pattern: str | None = Field(default=None, description="of format: a regular expression")

    @model_validator(mode="after")
    def _is_there(self) -> RewardSpec:
        if ":" not in self.name and self.name not in NAMES:
            raise ValueError(f"{unknown_name(self.name, NAMES, kind='reward')} or file.py:function")
        for key, owner in (("target", "length"), ("pattern", "format")):
            if (getattr(self, key) is None) == (self.name == owner):
                verb = "needs" if self.name == owner else "has no"
                raise ValueError(f"reward {self.name!r} {verb} {key!r}")
        if self.pattern is not None:
            _check_pattern(self.pattern)
        return self


def reward_functions(
    specs: Sequence[RewardSpec], reference: str | None
) -> list[tuple[Reward, float]]:
    """Return the functions and their weights.

    Args:
        specs: of the recipe.
        reference: the column with the right answer, if it is named.

    Raises:
        UserError: a user's file or function is not there.
    """
    return [(_function(spec, reference), spec.weight) for spec in specs]


def text_of(completion: Any) -> str:
    """Return what a completion says: a text, or the last message of a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def reference_of(columns: dict[str, Any], wanted: str | None) -> list[str]:
    """Return the right answers among the columns of a batch.

    Raises:
        UserError: there are none.
    """
    names = REFERENCES if wanted is None else (wanted,)
    for name in names:
        if name in columns:
            return [text_of(value) for value in columns[name]]
    raise UserError(
        f"task.reference: found no column {' or '.join(names)} with the right answer, but "
        f"{', '.join(columns)}; name it, or take another reward"
    )


def _function(spec: RewardSpec, reference: str | None) -> Reward:
    if ":" in spec.name:
        return _users(spec.name)
    compared = _COMPARED.get(spec.name)

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        texts = [text_of(completion) for completion in completions]
        if compared is not None:
            right = reference_of(columns, reference)
            return [compared(text, answer) for text, answer in zip(texts, right, strict=True)]
        if spec.target is not None:
            return [builtin.length(text, spec.target) for text in texts]
        assert spec.pattern is not None
        return [builtin.pattern_match(text, spec.pattern) for text in texts]

    reward.__name__ = spec.name  # what TRL logs it as
    return reward


def _users(name: str) -> Reward:
    """Import a function of a user's file."""
    file, _, function = name.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"task.rewards: {name}: no such file {file}; expected file.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"task.rewards: {file}: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"task.rewards: {file} has no function {function!r}")
    return found if inspect.iscoroutinefunction(found) else _guarded(found, name)


def _guarded(function: Callable[..., Any], name: str) -> Reward:
    """Let what goes wrong in a user's function be one line that says where."""

    @functools.wraps(function)
    def reward(*args: Any, **columns: Any) -> list[float | None]:
        try:
            values = list(function(*args, **columns))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"task.rewards: {name}: {type(error).__name__}: {one_line(error)} "
                f"({last.filename}:{last.lineno}); mend the function"
            ) from error
        for value in values:
            if value is not None and not isinstance(value, numbers.Real):
                raise UserError(
                    f"task.rewards: {name}: got {value!r} for a completion, allowed is a number or "
                    "None; mend the function"
                )
        return values

    return reward


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
