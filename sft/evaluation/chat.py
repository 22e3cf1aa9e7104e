"""Talk to a language model: `sft chat`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sft.errors import UserError
from sft.evaluation.completions import end_tokens
from sft.evaluation.log_probs import predicts_tokens
from sft.evaluation.target import as_tuned
from sft.randomness import own_randomness

COMPLETIONS = ("prompt_completion", "text")  # formats whose models have seen no chat template
HELP = "/base: adapter off, /adapter: on, /clear: forget the conversation, /quit: leave"


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Args:
        max_new_tokens: longest reply.
        temperature: 0 takes the likeliest token always.
        top_p: draw among the likeliest tokens of this mass.
        seed: of the first reply; the next ones have the next seeds.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Chat:
    """A conversation with a model, of which the adapter can be switched off and on.

    Args:
        model: a causal language model, with an adapter or without.
        tokenizer: its own.
        sampling: how replies are drawn.
        system: what stands before the conversation, if anything.
        raw: continue each message as it is, without a chat template, and remember none; so it is
            for tokenizers that have none.

    Raises:
        UserError: the model predicts no text, or a system prompt has no template to go to.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        system: str | None = None,
        *,
        raw: bool = False,
    ) -> None:
        if not predicts_tokens(model):
            raise UserError("TARGET: predicts no text; give a language model")
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.templated = not raw and bool(getattr(tokenizer, "chat_template", None))
        if system is not None and not self.templated:
            why = "with --raw there" if raw else "of this tokenizer there"
            raise UserError(f"--system: {why} is no chat template; leave it out")
        self.first = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self.first)
        self.adapted, self.replies = hasattr(model, "disable_adapter"), 0

    def say(self, text: str, streamer: Any = None) -> str:
        """Return the model's reply to a message.

        Args:
            text: the message.
            streamer: takes the tokens as they come, as in `generate`.
        """
        self.messages.append({"role": "user", "content": text})
        ids = self._ids(text)
        with own_randomness(self.sampling.seed + self.replies), self._shape():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer,
                generation_config=self._settings(),
            )  # fmt: skip
        self.replies += 1
        reply = str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": reply})
        return reply

    def command(self, text: str) -> str | None:
        """Obey what begins with a stroke; return what to print, or None to leave."""
        word = text.strip().lower()
        if word in ("/quit", "/exit", "/q"):
            return None
        if word == "/clear":
            self.messages = list(self.first)
            return "cleared"
        if word in ("/base", "/adapter"):
            if not hasattr(self.model, "disable_adapter"):
                return f"{word}: there is no adapter on this model"
            self.adapted = word == "/adapter"
            return "the adapter is on" if self.adapted else "the adapter is off: this is the base"
        return HELP if word == "/help" else f"{word}: unknown; {HELP}"

    def _ids(self, text: str) -> torch.Tensor:
        """Return what the model is given: the conversation, its oldest turns left out if too long.

        Raises:
            UserError: the message alone is too long.
        """
        config = self.model.config.get_text_config()
        longest = (getattr(config, "max_position_embeddings", None) or 10**9) - 1
        while True:
            ids = self._encoded(text)
            if len(ids) <= longest:
                return torch.tensor([ids], device=self.model.device)
            start = len(self.first)
            if not self.templated or len(self.messages) <= start + 1:
                self.messages.pop()
                raise UserError(f"the message has {len(ids)} tokens, allowed are {longest}")
            del self.messages[start : start + 2]

    def _encoded(self, text: str) -> list[int]:
        if not self.templated:
            return list(self.tokenizer(text)["input_ids"])
        given = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=False
        )
        return list(self.tokenizer(given, add_special_tokens=False)["input_ids"])

    def _shape(self) -> contextlib.AbstractContextManager[Any]:
        """Return what the model runs under: its adapter on, or off."""
        if not hasattr(self.model, "disable_adapter"):
            return contextlib.nullcontext()
        found: contextlib.AbstractContextManager[Any] = (
            as_tuned(self.model) if self.adapted else self.model.disable_adapter()
        )
        return found

    def _settings(self) -> Any:
        from transformers import GenerationConfig

        own, drawn = self.sampling, self.sampling.temperature > 0
        return GenerationConfig(
            max_new_tokens=own.max_new_tokens,
            do_sample=drawn,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=end_tokens(self.model, self.tokenizer),
            **({"temperature": own.temperature, "top_p": own.top_p, "top_k": 0} if drawn else {}),
        )


def converse(
    chat: Chat, lines: Iterable[str], streamer: Any, tell: Callable[[str], object]
) -> None:
    """Answer line after line, until there are no more or one asks to leave.

    Args:
        chat: the conversation.
        lines: of the user; those that begin with a stroke are commands.
        streamer: prints replies as they come.
        tell: prints what commands answer.
    """
    for line in lines:
        if not line.strip():
            continue
        if not line.lstrip().startswith("/"):
            try:
                chat.say(line, streamer)
            except UserError as error:
                tell(str(error))
            continue
        answer = chat.command(line)
        if answer is None:
            return
        tell(answer)
