"""The batch that a plan is for: the longest rows of the data, or as long as the recipe allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sft.errors import UserError
from sft.recipe.arguments import build_arguments
from sft.recipe.schema import Recipe
from sft.tasks.find import build_task
from sft.tasks.task import Task

if TYPE_CHECKING:
    from sft.data.encode import Encoded
    from sft.data.load import Examples

# rows whose text is longest are encoded, so many for each row of a batch
ENCODED = 16
DEFAULT_LENGTH = 1024
Reference = Literal["none", "itself", "copy"]


@dataclass(frozen=True)
class Batch:
    """Shape of a micro-batch of one process.

    Args:
        rows: of it.
        length: tokens of each row, padding included.
        labels: how many there are in all.
        source: where these numbers are from, in words.
        sequences: of each row: of a preference there are two.
        reference: what else reads them, without a graph: nothing, the model itself with its
            adapter off, or a copy of it as it was.
    """

    rows: int
    length: int
    labels: int
    source: str
    sequences: int = 1
    reference: Reference = "none"

    @property
    def tokens(self) -> int:
        """Tokens that the model computes."""
        return self.rows * self.sequences * self.length

    def wide(self, rows: int) -> Batch:
        """Return a batch of as long rows, but so many of them."""
        return replace(self, rows=rows, labels=max(1, self.labels * rows // self.rows))


def batch_of(recipe: Recipe, length: int | None = None) -> Batch:
    """Return the batch to plan for.

    Args:
        recipe: resolved.
        length: tokens of each row, over what the recipe and its data say.
    """
    task = build_task(recipe.task)
    found = _of_rows(recipe, task, length)
    written = int(getattr(build_arguments(recipe), "max_completion_length", None) or 0)
    if written:  # what the model writes to a prompt
        labels = found.rows * written
        found = replace(found, length=found.length + written, labels=labels)
    labels = found.labels * task.sequences
    return replace(found, sequences=task.sequences, labels=labels, reference=_reference(recipe))


def _reference(recipe: Recipe) -> Reference:
    task, arguments = recipe.task["name"], build_arguments(recipe)
    compared = task == "dpo" or (task == "grpo" and getattr(arguments, "beta", 0.0) > 0)
    if not compared or getattr(arguments, "precompute_ref_log_probs", False):
        return "none"
    return "copy" if recipe.method["name"] == "full" else "itself"


def _of_rows(recipe: Recipe, task: Task, length: int | None) -> Batch:
    training = recipe.training
    rows = int(training.get("per_device_train_batch_size", 8))
    own = getattr(task, "options", None)
    longest = training.get("max_length", getattr(own, "max_length", DEFAULT_LENGTH))
    if "image_classification" in task.formats:
        return Batch(rows, 1, rows, "images as large as the model takes them")
    if length is not None:
        return _filled(rows, length, "--length")
    if training.get("packing"):
        return _filled(rows, longest or DEFAULT_LENGTH, "training.max_length, packed")
    try:
        return _from_data(recipe, rows, longest)
    except UserError:
        where = "training.max_length" if "max_length" in training else "the default max_length"
        return _filled(rows, longest or DEFAULT_LENGTH, f"{where}, as the data are not there")


def _filled(rows: int, length: int, source: str) -> Batch:
    return Batch(rows, length, rows * max(1, length - 1), source)


def _from_data(recipe: Recipe, rows: int, longest: int | None) -> Batch:
    """Return the batch of the longest examples."""
    from sft.data.load import load_data
    from sft.models import load_tokenizer

    if recipe.data.streaming:
        raise UserError("data.streaming: got true, whose rows are not counted; set --length")
    data = load_data(recipe.data, recipe.seed, build_task(recipe.task).formats)
    chosen = longest_rows(data, load_tokenizer(recipe.model), rows, longest)
    spans = [(len(row.prompt), len(row.prompt) + len(row.completion)) for _, row in chosen]
    length = _padded(max(stop for _, stop in spans), recipe.training.get("pad_to_multiple_of"))
    predicted = [range(max(start - 1, 0), stop - 1) for start, stop in spans]
    labels = sum(map(len, predicted))
    source = f"the longest of {len(data.train):,} examples"
    return Batch(rows, length, max(1, labels), source)


def longest_rows(
    data: Examples, tokenizer: Any, count: int, longest: int | None
) -> list[tuple[int, Encoded]]:
    """Return the place and content of the examples with the most tokens, the longest first.

    Of many, those of the longest text alone are encoded.

    Args:
        data: of a recipe.
        tokenizer: of its model.
        count: how many.
        longest: tokens that are kept of an example, or None.
    """
    from sft.data.encode import encode

    sizes = [sum(map(_size, row.values())) for row in data.train]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])[: ENCODED * count]
    found = [(i, encode(data.train[i], data.format, tokenizer, longest or 10**9)) for i in order]
    found.sort(key=lambda pair: -len(pair[1].prompt) - len(pair[1].completion))
    return found[:count]


def _size(value: Any) -> int:
    """Return the characters of a text, or of all texts in a conversation."""
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_size, value)) if isinstance(value, list) else len(str(value))


def _padded(length: int, multiple: int | None) -> int:
    return -(-length // multiple) * multiple if multiple else length
