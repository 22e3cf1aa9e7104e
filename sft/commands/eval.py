"""`sft eval`: measure a run, an adapter, or any model."""

from __future__ import annotations

from typing import Annotated

import typer

from sft.commands.arguments import BaseOption, JsonOption, user_errors


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Folder of a run, adapter, delta or model; or a model's name."
        ),
    ],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Whose data, metrics and task count.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Examples, as in data.train; default: the recipe's held out."),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="Names, commas between; default: the recipe's.")
    ] = None,
    base: BaseOption = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure the base of an adapter as well.")
    ] = False,
    forgetting: Annotated[
        bool, typer.Option("--forgetting", help="Read general text as well.")
    ] = False,
    examples: Annotated[
        int | None, typer.Option("--examples", min=1, help="So many of them.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest completion.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1)] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Default: a GPU if there is one.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure a model on held-out examples, or on any data.

    For example:

        sft eval runs/quickstart --compare

        sft eval runs/quickstart/merged --data test.jsonl --metrics nll,exact_match --json

        sft eval smollm2-135m-instruct --recipe quickstart --examples 20

        sft eval org/model --data questions.jsonl --metrics choice_accuracy_norm
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from sft.evaluation.command import as_json, evaluate_target, show

        asked = [name.strip() for name in metrics.split(",")] if metrics else None
        report = evaluate_target(
            target, base=base, recipe=recipe, data=data, metrics=asked, examples=examples,
            compare=compare, forgetting=forgetting, device=device, max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )  # fmt: skip
        if json:
            print(as_json(report))
            return
        from rich.console import Console

        show(report, Console())
