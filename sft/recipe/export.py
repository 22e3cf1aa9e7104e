"""The `export:` section, where it depends on others."""

from __future__ import annotations

from sft.recipe.schema import Recipe
from sft.recipe.source import Source
from sft.run.trainable import Trainable


def check_export(recipe: Recipe, method: Trainable, source: Source) -> None:
    """Refuse what cannot be written in the end, before anything is trained.

    Args:
        recipe: its `model` and `export` are read.
        method: what is trained.
        source: where the values were written.
    """
    spec, packed = recipe.export, recipe.model.quantization
    reason = method.unmerged()
    if spec.merged and reason is not None:
        raise source.error("export.merged", f"got true, but {reason}; set it to false")
    adapters = [form for form in spec.also if form in ("lora", "shira")]
    if adapters and not method.saved:
        raise source.error(
            "export.also", f"got {adapters[0]}, but {method.name} leaves no adapter; leave it out"
        )
    if spec.also and reason is not None:
        raise source.error("export.also", f"got {spec.also[0]}, but {reason}; leave it out")
    if "patch" in spec.also and packed is not None and spec.quantized != "reference":
        raise source.error(
            "export.also",
            "got patch over a packed base, whose unpacked weights differ from it everywhere; set "
            "export.quantized: reference, or leave it out",
        )
    if not (spec.merged or method.saved):
        missing = "push_to_hub" if spec.push_to_hub else "also" if spec.also else None
        if missing is not None:
            raise source.error(
                f"export.{missing}", "got one, but nothing is written; set export.merged: true"
            )
    if spec.dtype != "auto" and packed is not None and spec.quantized == "requantize":
        raise source.error(
            "export.dtype", f"got {spec.dtype}, but the merged model is packed; leave it out"
        )
    if spec.private and spec.push_to_hub is None:
        raise source.error("export.private", "got true without push_to_hub; leave it out")
