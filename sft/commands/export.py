"""`sft export`: save a trained adapter in a stock format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sft.commands.arguments import user_errors
from sft.errors import UserError


def export(
    adapter: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of a saved adapter, or of a delta.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The model it was trained on; default: as saved.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="merged: a stock model; lora: a stock PEFT LoRA.")
    ] = "merged",
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="One rank for all modules of the LoRA.")
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    quantized: Annotated[
        str | None,
        typer.Option(
            "--quantized",
            help="Over a packed base, merge into: dequantize (the default), requantize, reference.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a filled folder.")
    ] = False,
) -> None:
    """Save a trained adapter in a stock format, then check it by reloading.

    Examples:
        sft export runs/quickstart/adapter --base smollm2-135m-instruct --to merged

        sft export runs/sora/adapter --format lora --to lora
    """
    with user_errors():
        if form not in ("merged", "lora"):
            raise UserError(f"--format: got {form!r}; expected merged or lora")
        if uniform_rank and form != "lora":
            raise UserError("--uniform-rank: only a LoRA has ranks; pass --format lora as well")
        from sft.export.adapter import export_adapter, export_adapter_as_lora
        from sft.export.delta import export_delta, is_delta
        from sft.quiet import quiet_libraries

        quiet_libraries()
        if form == "lora" and is_delta(adapter):
            raise UserError("--format: got lora; a delta has no low rank, take merged")
        if quantized and (form == "lora" or is_delta(adapter)):
            raise UserError("--quantized: is of an adapter that is merged; leave it out")
        if form == "merged":
            asked: dict[str, Any] = {"base": base, "to": to, "dtype": dtype, "overwrite": overwrite}
            if is_delta(adapter):
                difference = export_delta(adapter, **asked)
            else:
                difference = export_adapter(adapter, **asked, quantized=quantized)
            print(f"{to}: written; reloaded, max |logit difference| {difference:g}")
            return
        ranks, difference = export_adapter_as_lora(
            adapter, base=base, to=to, dtype=dtype, uniform_rank=uniform_rank, overwrite=overwrite
        )
        shown = f"{len(ranks)} modules of rank {min(ranks.values())} to {max(ranks.values())}"
        print(f"{to}: written, {shown}; loaded by PEFT, max |logit difference| {difference:g}")
