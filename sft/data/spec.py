"""The `data:` section of a recipe: sources, how they are mixed, what is held out."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from sft.errors import unknown_name
from sft.recipe.section import Section

Format = Literal[
    "auto",
    "text",
    "prompt_completion",
    "messages",
    "alpaca",
    "sharegpt",
    "preference",
    "prompt",
    "classification",
    "token_classification",
    "image_classification",
    "seq2seq",
    "multiple_choice",
    "tokenised",
]
FORMATS: tuple[str, ...] = get_args(Format)


class SourceSpec(Section):
    """One place that examples come from."""

    path: str = Field(
        min_length=1,
        description="file, glob, folder, org/name[:[config/]split] of the hub, or embedded name",
    )
    format: Format = "auto"
    columns: dict[str, str] = Field(
        default_factory=dict, description="our column: theirs, or a template such as '{question}?'"
    )
    config: str | None = Field(default=None, description="of a hub id with several")
    split: str | None = Field(default=None, description="of a hub id or folder; default: train")
    revision: str | None = Field(default=None, description="of a hub id")
    weight: float | None = Field(default=None, gt=0, description="share of what is drawn")
    fraction: float | None = Field(default=None, gt=0, le=1, description="use so much of it")
    examples: int | None = Field(default=None, gt=0, description="use so many of them")

    @model_validator(mode="after")
    def _one_size(self) -> SourceSpec:
        if self.fraction is not None and self.examples is not None:
            raise ValueError("examples: got fraction as well; keep one of both")
        return self


Sources = str | list[SourceSpec]


class DataSpec(Section):
    """Training and held-out examples; one of `eval`, `eval_fraction`, `eval_examples` at most."""

    train: Sources = Field(
        description="file, glob, folder, hub id, 'cmudict' (embedded), or a list of sources"
    )
    eval: Sources | None = Field(default=None, description="held-out examples, given as `train` is")
    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    eval_examples: int | None = Field(default=None, gt=0)
    train_examples: int | None = Field(default=None, gt=0, description="use only the first N")
    format: Format = "auto"
    columns: dict[str, str] = Field(
        default_factory=dict, description="our column: theirs, or a template such as '{question}?'"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="skip: leave malformed rows out, and list them"
    )
    mixing: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted", description="sources with weights: when drawing ends"
    )
    streaming: bool = Field(default=False, description="read while training; needs max_steps")
    shuffle_buffer: int = Field(default=1000, gt=0, description="rows that streaming shuffles")

    @model_validator(mode="before")
    @classmethod
    def _read_sources(cls, values: Any) -> Any:
        """Check sources here: errors then name the key that they are about."""
        if not isinstance(values, dict):
            return values
        given = {key: values[key] for key in ("train", "eval") if values.get(key) is not None}
        return values | {key: _sources(key, value) for key, value in given.items()}

    @model_validator(mode="after")
    def _one_held_out_rule(self) -> DataSpec:
        rules = ("eval", "eval_fraction", "eval_examples")
        given = [key for key in rules if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: got {given[0]} as well; keep one of {', '.join(rules)}")
        if self.streaming and self.eval_fraction is not None:
            raise ValueError(
                "eval_fraction: got streaming as well, which counts no rows; set eval_examples"
            )
        return self

    def sources(self, key: Literal["train", "eval"]) -> list[SourceSpec]:
        """Return the sources under a key, each with its format and columns filled in."""
        given: Sources = getattr(self, key) or []
        listed = [SourceSpec(path=given)] if isinstance(given, str) else given
        shared = {"format": self.format, "columns": self.columns}
        return [
            source.model_copy(update={k: v for k, v in shared.items() if not _says(source, k)})
            for source in listed
        ]


def _says(source: SourceSpec, key: str) -> bool:
    value = getattr(source, key)
    return bool(value) and value != "auto"


def _sources(key: str, value: Any) -> Any:
    """Return a path as it is, and a list as a list of sources.

    Raises:
        ValueError: as `key: what is wrong`.
    """
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key}: got {value!r}; expected a path, or a list of sources")
    return [_source(f"{key}.{index}", item) for index, item in enumerate(value)]


def _source(key: str, item: Any) -> SourceSpec:
    if isinstance(item, SourceSpec):
        return item
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, dict):
        raise ValueError(f"{key}: got {item!r}; expected a path, or a section with one")
    try:
        return SourceSpec.model_validate(item)
    except ValidationError as error:
        found = error.errors()[0]
    inner = ".".join(str(part) for part in (key, *found["loc"]))
    if found["type"] == "extra_forbidden":
        raise ValueError(f"{inner}: {unknown_name(str(found['loc'][-1]), SourceSpec.model_fields)}")
    if found["type"] == "missing":
        raise ValueError(f"{inner}: is missing (file, glob, folder, or hub id)")
    if found["type"] == "value_error":
        raise ValueError(f"{key}.{found['ctx']['error']}")
    expected = found["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    raise ValueError(f"{inner}: got {found['input']!r}; expected {expected}")
