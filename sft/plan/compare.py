"""All methods side by side, at the trained weights of a LoRA."""

from __future__ import annotations

from typing import Any

from sft.errors import UserError
from sft.plan.batch import Batch
from sft.plan.devices import Device
from sft.plan.placement import Placement
from sft.plan.plan import Known, Plan, plan
from sft.recipe.schema import Recipe

RANK = 16
OWN = "this recipe"
_LINEAR = {"target_modules": "all-linear"}
_SPIEL = {"name": "spiel", "match_lora_rank": RANK, **_LINEAR}
# name -> method section, and zeroth_order section or None
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "spiel": (_SPIEL, None),
    "s2ft": ({"name": "s2ft", "match_lora_rank": RANK}, None),
    "sora": ({"name": "sora", "r": RANK, **_LINEAR}, None),
    "sltrain": ({"name": "sltrain", "r": RANK, "density": 0.005, **_LINEAR}, None),
    "lora": ({"name": "lora", "r": RANK, **_LINEAR}, None),
    "full": ({"name": "full"}, None),
    "mezo": ({"name": "full"}, {}),
    "mezo over spiel": ({**_SPIEL, "growth": "none"}, {}),
}


def variant(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with another method of the table."""
    method, zeroth_order = METHODS[name]
    return recipe.model_copy(update={"method": method, "zeroth_order": zeroth_order})


def compare(
    recipe: Recipe, own: Plan, batch: Batch, device: Device, placement: Placement, known: Known
) -> dict[str, Plan]:
    """Return plans by name: the recipe's own, and each method at the size of a LoRA of rank 16.

    What cannot run, such as full training of a packed base, is left out.
    """
    found = {OWN: own}
    for name in METHODS:
        changed = variant(recipe, name)
        if recipe.model.quantization is not None and name in ("full", "mezo"):
            continue
        try:
            found[name] = plan(changed, batch, device, placement, known)
        except UserError:
            continue
    return found
