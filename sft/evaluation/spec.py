"""The `evaluation:` and `forgetting:` sections of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft.recipe.section import Section


class EvaluationSpec(Section):
    """What is measured on the held-out examples: before, after, and while training evaluates."""

    metrics: list[str] | None = Field(default=None, description="default: those of the task")
    num_examples: int | None = Field(default=None, gt=0, description="default: all held-out ones")
    max_new_tokens: int = Field(default=64, gt=0)
    batch_size: int = Field(default=16, gt=0)
    samples: int = Field(
        default=3, ge=0, description="held-out prompts completed before and after training"
    )
    also: dict[str, str] = Field(
        default_factory=dict, description="name: path of other data to judge by, such as questions"
    )


class ForgettingSpec(Section):
    """How far training moves the model on text that has nothing to do with it."""

    data: str = Field(
        default="general", min_length=1, description="a path as in data.train, or 'general'"
    )
    every: Literal["run", "eval"] = Field(
        default="run", description="before and after the run; or at each evaluation as well"
    )
    max_tokens: int = Field(default=1024, gt=1, description="so much of the text is read")
    window: int = Field(default=512, gt=1, description="tokens that are read at once")
    threshold: float = Field(
        default=0.1, ge=0, description="a loss that rises by more, in nats a token, is an alert"
    )
