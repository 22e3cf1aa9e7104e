"""`sft chat`: talk to a run, an adapter, or any language model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from sft.commands.arguments import BaseOption, user_errors
from sft.errors import UserError

WRITES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # what tasks call models that answer


def chat(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Folder of a run, adapter, delta or model; or a model's name."
        ),
    ],
    base: BaseOption = None,
    system: Annotated[
        str | None, typer.Option("--system", help="What stands before the conversation.")
    ] = None,
    once: Annotated[
        str | None, typer.Option("--once", metavar="PROMPT", help="Answer this, and leave.")
    ] = None,
    raw: Annotated[
        bool | None,
        typer.Option("--raw/--template", help="Chat template or none; default: as trained."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0: the likeliest token, always.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0, max=1, help="Draw from tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    device: Annotated[
        str | None, typer.Option("--device", help="Default: a GPU if there is one.")
    ] = None,
) -> None:
    """Talk to a model.

    In it, /base and /adapter switch between the two, /clear forgets, and /quit leaves.

    For example:

        sft chat runs/quickstart

        sft chat runs/quickstart --raw --once "c a t ->" --max-new-tokens 8

        sft chat smollm2-135m-instruct --system "Answer in one word." --temperature 0.7
    """
    with user_errors():
        from sft.quiet import quiet_libraries

        quiet_libraries()
        from transformers import TextStreamer

        from sft.evaluation.chat import COMPLETIONS, HELP, Chat, Sampling, converse
        from sft.evaluation.target import (
            find_target,
            open_processor,
            open_target,
            task_of,
            trained_on,
        )

        found = find_target(target, base=base)
        task = task_of(found)
        if task.peft_type not in WRITES:
            raise UserError(
                f"{target}: is a model for {task.name}, which writes no text; give one that "
                "does, or judge this one by sft eval"
            )
        tokenizer = open_processor(found, task)
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        plain = trained_on(found) in COMPLETIONS if raw is None else raw
        model = open_target(found, task, None, device)
        talk = Chat(model, tokenizer, sampling, system, raw=plain)
        streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        if once is not None:
            talk.say(once, streamer)
            return
        print(HELP)
        converse(talk, _lines(), streamer, print)


def _lines() -> Iterator[str]:
    """Yield what the user types, after a sign on a terminal."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
