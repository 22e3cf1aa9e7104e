"""`sft plan`: what a recipe takes, before any weight is loaded."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from sft.errors import UserError
from sft.plan.batch import batch_of
from sft.plan.devices import device_of
from sft.plan.placement import Placement
from sft.plan.plan import plan
from sft.plan.show import as_data, show_plan
from sft.recipe import load_recipe


def run(
    name: str,
    overrides: list[str],
    *,
    gpu: str | None = None,
    world: int = 1,
    zero: int | None = None,
    fsdp: bool = False,
    offload: str = "",
    length: int | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Plan a recipe and print what was found.

    Args:
        name: of the recipe.
        overrides: settings over it.
        gpu: a device's name or memory; None for this machine.
        world: processes.
        zero: stage of DeepSpeed's ZeRO.
        fsdp: shard by FSDP.
        offload: "optimizer", "base", or both with a comma between.
        length: tokens a row.
        as_json: print data alone.
        console: where to print.

    Raises:
        UserError: an option is out of range, or the recipe does not fit its model.
    """
    recipe = load_recipe(name, overrides)
    placement = _placement(world, zero, fsdp, offload)
    device = device_of(gpu)
    batch = batch_of(recipe, length)
    found = plan(recipe, batch, device, placement)
    data = {"recipe": name, "batch": vars(batch), "plan": as_data(found)}
    if as_json:
        print(json.dumps(data, indent=1))
        return data
    show_plan(console or Console(), found, batch, placement)
    return data


def _placement(world: int, zero: int | None, fsdp: bool, offload: str) -> Placement:
    if zero is not None and zero not in (0, 1, 2, 3):
        raise UserError(f"--zero: got {zero}, allowed is 0, 1, 2 or 3")
    if zero and fsdp:
        raise UserError("--fsdp: got --zero as well; keep one of them")
    engine = "fsdp" if fsdp else f"zero{zero}" if zero else None
    parts = frozenset(part.strip() for part in offload.split(",") if part.strip())
    return Placement(world, engine, parts)
