"""`sft plan`: bytes and seconds of a recipe, before any weight is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from sft.commands.arguments import Overrides, RecipeArgument, user_errors


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Such as a100-80gb, or 24GB; default: this machine.")
    ] = None,
    world: Annotated[int, typer.Option("--world", help="Processes, one device each.")] = 1,
    zero: Annotated[int | None, typer.Option("--zero", help="Stage of DeepSpeed's ZeRO.")] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard by FSDP.")] = False,
    offload: Annotated[
        str | None,
        typer.Option("--offload", help="To the host: optimizer, base, or optimizer,base."),
    ] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens of each row.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Plan all methods as well.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print data alone.")] = False,
) -> None:
    """Tell what a run takes, before any weight is loaded.

    Bytes by kind, and seconds a step.

    For example:

        sft plan quickstart

        sft plan my.yaml --gpu 24GB --world 4 --zero 3 training.per_device_train_batch_size=16
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.plan.command import run

        run(
            recipe, overrides or [], gpu=gpu, world=world, zero=zero, fsdp=fsdp, offload=offload,
            length=length, comparing=compare, as_json=json,
        )  # fmt: skip
