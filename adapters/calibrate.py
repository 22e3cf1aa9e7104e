"""Choose supports by scores accumulated over batches of the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sft.adapters.base import SparseTuner
from sft.adapters.calibration import Calibration
from sft.adapters.labels import count_labels
from sft.adapters.layer import sparse_layers
from sft.adapters.ranks import ALONE, Ranks

Objective = Callable[[Any], Tensor]


def pending_adapters(model: nn.Module) -> list[str]:
    """Return the adapters whose support is a placeholder until `calibrate` has run."""
    return sorted({name for layer in sparse_layers(model).values() for name in layer.pending})


def calibrate(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    adapter: str = "default",
    ranks: Ranks = ALONE,
    *,
    accumulate: bool = True,
    objective: Objective | None = None,
) -> int:
    """Run batches and choose the adapter's support by what they show.

    Runs in eval mode, so dropout draws nothing: forward alone where activations decide, and
    backward too where gradients do.

    Args:
        model: a PeftModel whose adapter has a calibrated selection.
        batches: keyword arguments of the model, labels included where gradients decide; as many are
            read as the configuration says.
        adapter: its name.
        ranks: processes that read different batches, as many each, and choose by all of them.
        accumulate: let gradients reach the parameters; False where an engine counts those that do.
        objective: returns the loss of a batch that has no labels, such as one of preferences;
            without one, the model alone says what a loss is.

    Returns:
        The number of batches read.

    Raises:
        ValueError: there are no batches, they give no loss, or nothing reaches a layer.
    """
    tuner: SparseTuner = model.base_model
    calibration = tuner.calibration(adapter)
    if calibration is None:
        found = getattr(tuner.peft_config[adapter], "selection", None)
        raise ValueError(f"selection: got {found!r}, which reads no batches")
    layers = tuner.adapted_layers(adapter)
    if any(bool(layer.trained_values[adapter].any()) for layer in layers.values()):
        raise ValueError(
            f"calibration: adapter {adapter!r} is trained already; a new support would undo it"
        )
    calibration.ranks = ranks
    wanted = calibration.num_batches(_length(batches))
    training = model.training
    model.eval()
    calibration.open()
    try:
        chosen = islice(batches, wanted)
        count = _run(model, chosen, calibration, objective, accumulate=accumulate)
    finally:
        calibration.close()
        model.train(training)
        model.zero_grad(set_to_none=True)
    calibration.choose(count)
    return count


def _length(batches: Any) -> int | None:
    """Return how many there are, or None: a loader of a stream has a length only by its looks."""
    try:
        return len(batches)
    except TypeError:
        return None


def _share(model: Any, batch: Any, ranks: Ranks) -> float:
    """Return by what a rank's mean loss counts more than the others': by its labels."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if ranks.count == 1 or not isinstance(labels, Tensor):
        return 1.0
    mine = float(count_labels(model, labels))
    every = sum(row[0] for row in ranks.gather([mine]))
    return mine * ranks.count / every if every else 1.0


def _run(
    model: Any,
    batches: Iterable[Any],
    calibration: Calibration,
    objective: Objective | None,
    *,
    accumulate: bool,
) -> int:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = 0
    for batch in batches:
        calibration.before_batch(batch if isinstance(batch, Mapping) else {})
        with nullcontext() if calibration.backward else torch.no_grad():
            loss = _forward(model, batch, objective, backward=calibration.backward)
        if calibration.backward:
            if loss is None:
                raise ValueError("calibration: the batches give no loss; they need labels")
            loss = loss * _share(model, batch, calibration.ranks)
            if accumulate:
                loss.backward()
            else:
                torch.autograd.grad(loss, trained, allow_unused=True)
        count += 1
    if count == 0:
        raise ValueError("calibration: got no batches; pass at least one")
    return count


def _forward(model: Any, batch: Any, objective: Objective | None, *, backward: bool) -> Any:
    """Run a batch; return its loss, or None where nobody knows one."""
    prompts = not isinstance(batch, Mapping)  # rows, of which a trainer makes what the model reads
    if objective is not None and (prompts or (backward and "labels" not in batch)):
        return objective(batch)
    return getattr(model(**batch), "loss", None)
