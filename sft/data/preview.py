"""One example as the trainer feeds it: its text, and what of it is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from sft.randomness import own_randomness

Segment = tuple[str, bool]  # a text, and whether its tokens are trained on

IGNORED = -100
LONGEST = 600  # characters of a segment that are shown
MOST = 60  # segments


def preview(trainer: Any) -> dict[str, Any]:
    """Return the first example of a trainer, collated by it, as run.json's `data.preview` has it.

    Nothing of the training is disturbed: no row is used up, no random number drawn.

    Args:
        trainer: of transformers or TRL; its train_dataset is ready.

    Returns:
        `text`, `segments` of it with whether they are trained on, and `label` where it has one.
    """
    with own_randomness(0):
        row = next(iter(trainer.train_dataset))
        batch = trainer.data_collator([row])
    found = segments(trainer, batch)
    shown = [(_shortened(text), trained) for text, trained in found[:MOST]]
    if len(found) > MOST:
        shown.append((" ...", False))
    label = _label(trainer, batch)
    return {
        "text": "".join(text for text, _ in shown),
        "segments": [list(segment) for segment in shown],
        **({} if label is None else {"label": label}),
    }


def segments(trainer: Any, batch: Any) -> list[Segment]:
    """Return the first row of a collated batch, cut where training on it begins or ends."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if not hasattr(batch, "keys"):  # rows as they are: replies are yet to be written
        return [(_prompt(batch[0]["prompt"], tokenizer), False)]
    if "input_ids" not in batch:
        shape = " x ".join(str(size) for size in batch["pixel_values"].shape[1:])
        return [(f"(an image of {shape})", False)]
    ids, labels = batch["input_ids"], batch.get("labels")
    writes = getattr(trainer.model.config, "is_encoder_decoder", False)
    if writes and labels is not None and labels.dim() == 2:  # else it classifies
        target = [id for id in labels[0].tolist() if id != IGNORED]
        source = _decoded(_there(batch, 0), [False] * len(_there(batch, 0)), tokenizer)
        return [*source, ("\n", False), *_decoded(target, [True] * len(target), tokenizer)]
    if "labels" not in batch and len(ids) == 2:  # of one row: a pair of replies
        first = [("chosen: ", False), *_row(batch, 0, tokenizer)]
        return [*first, ("\nrejected: ", False), *_row(batch, 1, tokenizer)]
    return _row(batch, 0, tokenizer)


def show(found: dict[str, Any], console: Console) -> None:
    """Print an example: what is trained on is bold and green, or where there is no colour, «»."""
    coloured = console.is_terminal and not console.no_color
    mark = "bold green" if coloured else "«»"
    label = f"; label: {found['label']}" if "label" in found else ""
    console.print(f"first example ({mark}: trained on{label})", highlight=False, markup=False)
    text = Text("  ")
    for part, trained in found["segments"]:
        lined = part.replace("\n", "\n  ")
        if coloured:
            text.append(lined, style="bold green" if trained else "dim")
        else:
            text.append(f"«{lined}»" if trained else lined)
    console.print(text, soft_wrap=True)


def _row(batch: Any, index: int, tokenizer: Any) -> list[Segment]:
    """Decode a row that is not padding; a mask of the completion counts where labels lack."""
    ids = batch["input_ids"]
    labels, mask = batch.get("labels"), batch.get("completion_mask")
    if labels is not None and labels.shape == ids.shape:
        trained = (labels[index] != IGNORED).tolist()
    elif mask is not None:
        trained = (mask[index] == 1).tolist()
    else:
        trained = [False] * ids.shape[1]
    return _decoded(_there(batch, index), _there(batch, index, trained), tokenizer)


def _there(batch: Any, index: int, values: Sequence[Any] | None = None) -> list[Any]:
    """Return what is not padding of the ids of a row, or of values that belong to them."""
    ids = batch["input_ids"][index].tolist() if values is None else values
    mask = batch.get("attention_mask")
    there = [True] * len(ids) if mask is None else mask[index].tolist()
    return [value for value, kept in zip(ids, there, strict=True) if kept]


def _decoded(ids: Sequence[int], trained: Sequence[bool], tokenizer: Any) -> list[Segment]:
    """Decode token ids in runs that are alike; the whole text decides where a run's text ends."""
    whole, found, start = _text(ids, tokenizer), list[Segment](), 0
    for stop, kind in _runs(trained):
        prefix = _text(ids[:stop], tokenizer).rstrip("�")  # half a character
        if not whole.startswith(prefix) or len(prefix) < start:
            return [(_text(ids[a:b], tokenizer), kind) for a, b, kind in _spans(trained)]
        end = len(whole) if stop == len(ids) else len(prefix)
        found.append((whole[start:end], kind))
        start = end
    return found


def _runs(trained: Sequence[bool]) -> Iterator[tuple[int, bool]]:
    """Yield where each run of equal values stops, and its value."""
    stop = 0
    for kind, run in groupby(trained):
        stop += len(list(run))
        yield stop, kind


def _spans(trained: Sequence[bool]) -> Iterator[tuple[int, int, bool]]:
    start = 0
    for stop, kind in _runs(trained):
        yield start, stop, kind
        start = stop


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _prompt(prompt: Any, tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))


def _label(trainer: Any, batch: Any) -> str | None:
    """Return the class, or the value, that a row is to be given."""
    labels = batch.get("labels") if hasattr(batch, "keys") else None
    if labels is None or labels.dim() != 1:
        return None
    value, names = labels[0].item(), trainer.model.config.id2label
    return str(names.get(value, value)) if isinstance(value, int) else f"{value:g}"


def _shortened(text: str) -> str:
    """Leave the middle of a long text out."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"
