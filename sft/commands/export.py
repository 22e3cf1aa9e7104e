"""`sft export`: save what was trained in a stock format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sft.commands.arguments import BaseOption, user_errors
from sft.errors import UserError

_FORMS = "merged, adapter, lora, shira, patch or gguf"


def export(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of an adapter, a run, a delta or a model.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORM", help=f"{_FORMS}.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None,
    base: BaseOption = None,
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
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="lora: highest rank of a rounded delta."),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", help="lora: largest relative error of one."),
    ] = None,
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="lora: one rank for all modules.")
    ] = False,
    gguf_type: Annotated[
        str | None, typer.Option("--gguf-type", help="gguf: f32, f16, bf16 or q8_0.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", help="merged: of a file, such as 5GB.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload and compare logits.")
    ] = True,
    push: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload to the Hugging Face hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="push: make it private.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a filled folder.")
    ] = False,
    form: Annotated[str | None, typer.Option("--format", hidden=True)] = None,
) -> None:
    """Save what was trained in a stock format, and check it.

    It is loaded again and its logits are compared, unless --no-verify is given.

    For example:

        sft export runs/quickstart --to merged --out merged

        sft export runs/sora --to lora --out lora

        sft export runs/quickstart/adapter --to patch --out patch
    """
    with user_errors():
        if form is not None:
            raise UserError(
                f"--format: is --to now, and the folder --out: sft export {source} --to {form} "
                f"--out {to}"
            )
        _check(
            to,
            {
                "--quantized": (quantized, ("merged", "patch", "gguf")),
                "--rank": (rank, ("lora",)),
                "--max-error": (max_error, ("lora",)),
                "--uniform-rank": (uniform_rank or None, ("lora",)),
                "--gguf-type": (gguf_type, ("gguf",)),
                "--max-shard-size": (max_shard_size, ("merged",)),
                "--dtype": (dtype if dtype != "auto" else None, ("merged", *_ADAPTERS)),
            },
        )
        if out is None:
            raise UserError(f"--out: got none; name the folder to write, such as --out {to}")
        if private and push is None:
            raise UserError("--private: is of what is pushed; pass --push as well")
        from sft.export.forms import Request
        from sft.export.forms import export as write
        from sft.export.hub import push as upload
        from sft.quiet import quiet_libraries

        quiet_libraries()
        given: dict[str, Any] = {
            "rank": rank, "max_error": max_error, "gguf_type": gguf_type,
            "max_shard_size": max_shard_size,
        }  # fmt: skip
        request = Request(
            to=out, base=base, dtype=dtype, overwrite=overwrite, verify=verify,
            quantized=quantized, uniform_rank=uniform_rank,
            **{key: value for key, value in given.items() if value is not None},
        )  # fmt: skip
        print(write(source, to, request, print))
        if push is not None:
            print(f"{upload(out, push, private=private)}: uploaded")


_ADAPTERS = ("adapter", "lora", "shira")


def _check(to: str, options: dict[str, tuple[object, tuple[str, ...]]]) -> None:
    """Raise UserError for an unknown form, or an option that the form does not take."""
    forms = ("merged", *_ADAPTERS, "patch", "gguf")
    if to not in forms:
        raise UserError(f"--to: got {to!r}; expected {_FORMS}; the folder to write is --out")
    for option, (value, takers) in options.items():
        if value is not None and to not in takers:
            raise UserError(f"{option}: is of --to {' or '.join(takers)}; leave it out")
