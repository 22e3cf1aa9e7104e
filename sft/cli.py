"""The command `sft`: its sub-commands, each in a file of sft/commands."""

from __future__ import annotations

from typing import Annotated

import typer

from sft import __version__
from sft.commands import (
    chat,
    compose,
    diff,
    env,
    eval,
    export,
    inspect,
    plan,
    plot,
    recipes,
    replay,
    report,
    schema,
    train,
    validate,
    verify,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Sparse fine-tuning: train a small part of a dense model, export a stock one.",
)


def _print_version(value: bool) -> None:
    if value:
        print(f"sft {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


app.command()(train.train)
app.command()(validate.validate)
app.command()(plan.plan)
app.command("eval")(eval.evaluate)
app.command()(chat.chat)
app.command()(export.export)
app.command()(replay.replay)
app.add_typer(recipes.app, name="recipes")
app.command()(inspect.inspect)
app.command()(diff.diff)
app.command()(compose.compose)
app.command()(verify.verify)
app.command()(report.report)
app.command()(schema.schema)
app.command()(plot.plot)
app.command()(env.env)


def main() -> None:
    """Run the command line."""
    app()
