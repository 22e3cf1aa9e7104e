"""What to change where a run does not fit, cheapest first; each change is planned anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sft.errors import UserError
from sft.kernels.kept import FORMS
from sft.plan.batch import Batch
from sft.plan.devices import Device
from sft.plan.placement import Placement
from sft.plan.plan import Known, Plan, plan
from sft.recipe.schema import QuantizationSpec, Recipe


@dataclass(frozen=True)
class Job:
    """What is planned."""

    recipe: Recipe
    batch: Batch
    placement: Placement


@dataclass(frozen=True)
class Step:
    """A change on top of those before it.

    Args:
        change: what to set.
        cost: what it costs besides.
        plan: with it, and all changes before it.
    """

    change: str
    cost: str
    plan: Plan


Change = Callable[[Job], "tuple[str, Job] | None"]


def advise(job: Job, found: Plan, device: Device, known: Known) -> list[Step]:
    """Return changes, one on top of another, until the run fits or nothing is left.

    A change that saves less than a hundredth is not taken.
    """
    steps: list[Step] = []
    for cost, change in _CHANGES:
        while not found.fits:
            made = change(job)
            if made is None:
                break
            try:
                planned = plan(made[1].recipe, made[1].batch, device, made[1].placement, known)
            except UserError:
                break
            if planned.needed > 0.99 * found.needed:
                break
            job, found = made[1], planned
            steps.append(Step(made[0], cost, planned))
    return steps


def _fewer_rows(job: Job) -> tuple[str, Job] | None:
    rows = job.batch.rows
    if rows == 1:
        return None
    half, training = rows // 2, job.recipe.training
    steps = int(training.get("gradient_accumulation_steps", 1)) * rows // half
    settings = {"per_device_train_batch_size": half, "gradient_accumulation_steps": steps}
    shown = " ".join(f"training.{key}={value}" for key, value in settings.items())
    return shown, replace(_trained(job, settings), batch=job.batch.wide(half))


def _fewer_bits(job: Job) -> tuple[str, Job] | None:
    method = job.recipe.method
    if method.get("saved_inputs") != FORMS[0] or job.recipe.zeroth_order is not None:
        return None
    changed = {**method, "saved_inputs": "int8"}
    return "method.saved_inputs=int8", _with(job, method=changed)


def _half(job: Job) -> tuple[str, Job] | None:
    model = job.recipe.model
    if model.dtype != "float32" or model.quantization is not None:
        return None
    return "model.dtype=bfloat16", _with(job, model=model.model_copy(update={"dtype": "bfloat16"}))


def _checkpoints(job: Job) -> tuple[str, Job] | None:
    training = job.recipe.training
    names = ("gradient_checkpointing", "activation_checkpointing")
    if any(training.get(name) for name in names) or job.recipe.zeroth_order is not None:
        return None
    name = next((name for name in names[::-1] if name in training), names[0])
    return f"training.{name}=true", _trained(job, {name: True})


def _shard(job: Job) -> tuple[str, Job] | None:
    stages = (None, "zero1", "zero2", "zero3")
    engine = job.placement.engine
    if job.placement.world == 1 or engine not in stages[:-1]:
        return None
    after = stages[stages.index(engine) + 1]
    assert after is not None
    return f"--zero {after[-1]}", replace(job, placement=replace(job.placement, engine=after))


def _offload(what: str, job: Job) -> tuple[str, Job] | None:
    if what in job.placement.offload or job.recipe.zeroth_order is not None:
        return None
    offload = job.placement.offload | {what}
    return f"offload.{what}=cpu", replace(job, placement=replace(job.placement, offload=offload))


def _pack(job: Job) -> tuple[str, Job] | None:
    model = job.recipe.model
    if model.quantization is not None or job.recipe.method["name"] == "full":
        return None
    spec = QuantizationSpec(bits="nf4")
    packed = model.model_copy(update={"quantization": spec})
    return "model.quantization.bits=nf4", _with(job, model=packed)


def _with(job: Job, **sections: Any) -> Job:
    return replace(job, recipe=job.recipe.model_copy(update=sections))


def _trained(job: Job, settings: dict[str, Any]) -> Job:
    return _with(job, training={**job.recipe.training, **settings})


def _changes() -> Iterator[tuple[str, Change]]:
    yield "no result changes, some speed goes", _fewer_rows
    yield "optimizer and weights are shared out, exchanged in each step", _shard
    yield "a little noise in the gradient", _fewer_bits
    yield "weights are rounded to 8 bits of precision", _half
    yield "forward runs twice", _checkpoints
    yield "optimizer steps wait for the host", lambda job: _offload("optimizer", job)
    yield "weights are rounded to 4 bits", _pack
    yield "weights cross the bus twice a step", lambda job: _offload("base", job)


_CHANGES = tuple(_changes())
