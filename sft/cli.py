"""The command `sft`. Heavy modules load inside the commands, so that help is quick."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sft import __version__
from sft.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Sparse fine-tuning: train a small part of a dense model, export a stock one.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="List, show and copy the shipped recipes.")
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe's.")
]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Print the user's own errors as one line and exit with 2; others keep their traceback."""
    try:
        yield
    except UserError as error:
        from sft.processes import say

        say(error)
        raise typer.Exit(2) from None


def _print_version(value: bool) -> None:
    if value:
        print(f"sft {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe; load no model.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines, no live bar.")] = False,
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, help="Start so many here, one for each GPU or socket."),
    ] = 1,
) -> None:
    """Fine-tune a model by a recipe.

    Examples:
        sft train quickstart

        sft train my.yaml method.density=0.01 training.learning_rate=5e-3 --dry-run

        sft train my.yaml --processes 2

        torchrun --nproc_per_node 2 -m sft train my.yaml
    """
    with user_errors():
        if processes > 1 and not dry_run:
            from sft.processes import start

            start(processes, _train_arguments(recipe, overrides or [], plain=plain))
            return
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.recipe import load_recipe, to_yaml

        resolved = load_recipe(recipe, overrides or [])
        if dry_run:
            print(to_yaml(resolved), end="")
            return
        from rich.console import Console

        from sft.run import train_from_recipe

        console = Console(force_terminal=False) if plain else Console()
        train_from_recipe(resolved, console)


def _train_arguments(recipe: str, overrides: list[str], *, plain: bool) -> list[str]:
    """Return the command line of one process."""
    return ["train", recipe, *overrides, *(["--plain"] if plain else [])]


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe, every key of it; loads neither data nor model.

    Example:
        sft validate my.yaml
    """
    with user_errors():
        from sft.quiet import quiet_libraries
        from sft.recipe import load_recipe

        quiet_libraries()
        load_recipe(recipe, overrides or [])
        print(f"{recipe}: ok")


@app.command()
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
    """Tell what a run takes, before any weight is loaded: bytes by kind, seconds a step.

    Examples:
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


@app.command()
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
        from sft.export_adapter import export_adapter, export_adapter_as_lora
        from sft.export_delta import export_delta, is_delta
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


@app.command()
def env() -> None:
    """Print versions, devices and threads, to paste into a bug report."""
    from sft.environment import report

    print(report())


@app.command()
def replay(
    log: Annotated[
        Path,
        typer.Argument(metavar="LOG", help="The log of a zeroth-order run, or its run folder."),
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The model it started from; default: as logged.")
    ] = None,
    until: Annotated[
        int | None, typer.Option("--until", metavar="STEP", help="Stop after so many updates.")
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="merged: a stock model; adapter; delta: changed weights."),
    ] = "merged",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="Where to compute.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a filled folder.")
    ] = False,
) -> None:
    """Rebuild the weights of a zeroth-order run from its base and its log, bit for bit.

    Examples:
        sft replay runs/mezo --to merged

        sft replay runs/mezo --until 500 --to earlier
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.export_replay import replay as rebuild

        done = rebuild(
            log, to=to, base=base, until=until, form=form, dtype=dtype, device=device,
            overwrite=overwrite,
        )  # fmt: skip
        cast = "" if dtype == "auto" else f" before the cast to {dtype}"
        proof = f"; the weights{cast} are the run's, bit for bit"
        if done.proven is None:
            proof = "; the log notes no hash of the weights there"
        print(f"{to}: {done.updates} updates replayed, {done.detail}{proof}")


@recipes_app.command("list")
def list_recipes() -> None:
    """List the shipped recipes."""
    from sft.shipped import shipped_recipes

    found = shipped_recipes()
    width = max((len(name) for name, _ in found), default=0)
    for name, summary in found:
        print(f"{name:<{width}}  {summary}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """Print a shipped recipe, comments and all."""
    with user_errors():
        from sft.shipped import find_recipe

        print(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    destination: Annotated[Path, typer.Argument(help="File or folder to write.")] = Path("."),
) -> None:
    """Copy a shipped recipe, to make it your own; an existing file is never replaced."""
    with user_errors():
        from sft.shipped import find_recipe

        source = find_recipe(name)
        target = destination / source.name if destination.is_dir() else destination
        try:
            with target.open("x", encoding="utf-8") as file:
                file.write(source.read_text(encoding="utf-8"))
        except FileExistsError:
            raise UserError(f"{target}: exists; give another name") from None
        except OSError as error:
            raise UserError(f"{target}: cannot be written ({error.strerror})") from error
        print(target)


def main() -> None:
    """Run the command line."""
    app()
