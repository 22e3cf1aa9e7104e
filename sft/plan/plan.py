"""`plan`: bytes and seconds of a recipe's training step, before any weight is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from sft.errors import UserError
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.plan.batch import Batch
from sft.plan.depth import SHALLOW, Found, equal_stack
from sft.plan.devices import FRAGMENTS, Device
from sft.plan.optimizers import optimizer_maker
from sft.plan.packed import compute_dtype, packed_weights
from sft.plan.placement import Placement, peak_on_device
from sft.plan.shapes import build, model_config
from sft.plan.step import Run, run_step
from sft.plan.timeline import ACTIVATIONS, GRADIENTS, Timeline
from sft.plan.timing import seconds_of
from sft.plan.zeroth_order import run_zeroth_order
from sft.recipe.arguments import build_arguments
from sft.recipe.schema import Recipe
from sft.run.trainable import Trainable, build_method


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Args:
        method: its name.
        trained: weights that are trained.
        total: weights of the model.
        device_bytes: at the peak of a step on one device, by kind.
        host_bytes: in the host's memory for each process, by kind.
        gradients: bytes of all gradients of one device.
        activations: bytes kept for backward.
        seconds: of a step; None where the device's speed is not known.
        device: what it is planned for.
    """

    method: str
    trained: int
    total: int
    device_bytes: dict[str, int]
    host_bytes: dict[str, int]
    gradients: int
    activations: int
    seconds: float | None
    device: Device = field(repr=False)

    @property
    def peak(self) -> int:
        """Bytes of tensors alive at once."""
        return sum(self.device_bytes.values())

    @property
    def needed(self) -> int:
        """Bytes that the device must have: what an allocator and a runtime take is added."""
        if self.device.kind == "cpu":
            return self.peak
        return round(self.peak * (1 + FRAGMENTS)) + self.device.overhead

    @property
    def fits(self) -> bool:
        """Whether the device has them."""
        return self.needed <= self.device.memory


Known = dict[str, tuple[Found, tuple[int, int], int]]


def plan(
    recipe: Recipe,
    batch: Batch,
    device: Device,
    placement: Placement,
    known: Known | None = None,
) -> Plan:
    """Plan the run of a resolved recipe.

    Args:
        recipe: resolved.
        batch: of one process and micro-batch.
        device: where.
        placement: how it is shared out.
        known: steps that were run before; this one's is added.

    Raises:
        UserError: method and model do not fit.
    """
    known = {} if known is None else known
    key = _key(recipe, batch, placement.aside)
    if key not in known:
        known[key] = _note(recipe, batch, placement.aside)
    found, (trained, total), gathered = known[key]
    return Plan(
        recipe.method["name"],
        trained,
        total,
        dict(peak_on_device(found, placement, gathered, trained)),
        dict(placement.on_host(found, trained)),
        round(found.most(GRADIENTS) * placement.share(GRADIENTS)),
        found.most(ACTIVATIONS),
        seconds_of(found, device, half=computes_in_half(recipe)),
        device,
    )


def _key(recipe: Recipe, batch: Batch, aside: bool) -> str:
    """Name what the steps of a recipe depend on."""
    sections = recipe.model_dump(include={"model", "method", "zeroth_order", "training"})
    return repr((sections, batch, aside))


def _note(recipe: Recipe, batch: Batch, aside: bool) -> tuple[Found, tuple[int, int], int]:
    """Return the steps, the numbers of trained and of all weights, and what sharders gather."""
    method = build_method(recipe)
    settle_selection(method)
    config = model_config(recipe)
    try:
        model = build(recipe, method, config)
    except ValueError as error:
        raise UserError(f"method: does not fit {recipe.model.name}: {error}") from error
    counts, gathered = method.counts(model), _gathered(model, config)
    make = stepper(recipe, model, batch, aside=aside)
    return _found(model, config, make), counts, gathered


def computes_in_half(recipe: Recipe) -> bool:
    """Tell whether most products are taken in half precision."""
    training = recipe.training
    return bool(training.get("bf16") or training.get("fp16")) or recipe.model.dtype in (
        "bfloat16", "float16",
    )  # fmt: skip


def settle_selection(method: Trainable) -> None:
    """Let a support be drawn: what is chosen by weights, batches or files is as large."""
    config: Any = method.config
    random = {"selection": "random", "exclude": None}
    known = {f.name for f in dataclasses.fields(config) if f.init}
    if "selection" in known:
        given = {key: value for key, value in random.items() if key in known}
        method.config = dataclasses.replace(config, **given)


def _found(model: Any, config: Any, make: Callable[[], Timeline]) -> Found:
    """Run steps: of the whole model, or of two shallow ones if its layers are alike."""
    stack = equal_stack(model, config)
    if stack is None:
        depth = getattr(config, "num_hidden_layers", 1)
        return Found((make(),), (depth,), depth)
    timelines = []
    for depth in SHALLOW:
        stack.cut(depth)
        timelines.append(make())
    return Found(tuple(timelines), SHALLOW, len(stack.layers))


def stepper(recipe: Recipe, model: Any, batch: Batch, *, aside: bool) -> Callable[[], Timeline]:
    """Return what runs a step of the model as it is now."""
    arguments = build_arguments(recipe)
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    dtype = half or next(model.parameters()).dtype
    packed = packed_weights(recipe, model)
    run = Run(
        batch,
        max_norm=float(arguments.max_grad_norm or 0.0),
        micro_batches=arguments.gradient_accumulation_steps,
        aside=aside or bool(packed),
        half=half,
        packed=packed,
        unpacked=compute_dtype(recipe, dtype).itemsize,
    )
    if recipe.zeroth_order is not None:
        return partial(run_zeroth_order, model, ZerothOrderConfig(**recipe.zeroth_order), run)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return partial(run_step, model, optimizer_maker(recipe), run)


def _gathered(model: Any, config: Any) -> int:
    """Return the bytes of weights that sharders gather at once: two of the largest blocks."""
    stack = equal_stack(model, config)
    blocks = [stack.layers[0]] * 2 if stack is not None else []
    blocks += [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m]
    sizes = {}
    for place, block in enumerate(blocks):
        shared = next(block.parameters(), None)  # a tied head is gathered with the embedding
        key = place if place < 2 else id(shared)
        sizes[key] = sum(p.numel() * p.element_size() for p in block.parameters())
    return sum(sorted(sizes.values())[-2:])
