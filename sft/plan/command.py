"""`sft plan`: what a recipe takes, before any weight is loaded."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from sft.plan.advice import Job, advise
from sft.plan.batch import batch_of
from sft.plan.compare import compare
from sft.plan.devices import device_of
from sft.plan.placement import placement_of
from sft.plan.plan import Known, plan
from sft.plan.read import read_recipe
from sft.plan.show import as_data, show_advice, show_comparison, show_plan


def run(
    name: str,
    overrides: list[str],
    *,
    gpu: str | None = None,
    world: int = 1,
    zero: int | None = None,
    fsdp: bool = False,
    offload: str | None = None,
    length: int | None = None,
    comparing: bool = True,
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
        offload: "optimizer", "base", both with a comma between, or "": over the recipe.
        length: tokens a row.
        comparing: plan all methods.
        as_json: print data alone.
        console: where to print.

    Raises:
        UserError: an option is out of range, or the recipe does not fit its model.
    """
    device = device_of(gpu)
    recipe = read_recipe(name, overrides, device)
    placement = placement_of(recipe, world, zero, fsdp, offload)
    batch = batch_of(recipe, length)
    known: Known = {}
    found = plan(recipe, batch, device, placement, known)
    steps = advise(Job(recipe, batch, placement), found, device, known)
    plans = compare(recipe, found, batch, device, placement, known) if comparing else {}
    data = {
        "recipe": name,
        "batch": vars(batch),
        "placement": placement.name,
        "plan": as_data(found),
        "advice": [{"change": s.change, "cost": s.cost, **as_data(s.plan)} for s in steps],
        "methods": {name: as_data(other) for name, other in plans.items()},
    }
    if as_json:
        print(json.dumps(data, indent=1))
        return data
    console = console or Console()
    show_plan(console, found, batch, placement)
    if not found.fits:
        show_advice(console, steps)
    if comparing:
        show_comparison(console, plans)
    return data
