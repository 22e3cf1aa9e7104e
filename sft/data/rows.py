"""What a row must hold, format by format; each check raises ValueError with what is wrong."""

from __future__ import annotations

import io
import string
from typing import Any

Row = dict[str, Any]

NO_LABEL = -100

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def check_text(row: Row, chat: bool) -> None:
    """`text`: what is read and learnt."""
    text_of(row, "text")


def check_prompt_completion(row: Row, chat: bool) -> None:
    """`prompt` and `completion`: both texts, or both lists of messages."""
    kinds = {_spoken(row, key, chat) for key in ("prompt", "completion")}
    if len(kinds) > 1:
        raise ValueError("one of prompt and completion is a text, one a list; write both alike")


def check_messages(row: Row, chat: bool) -> None:
    """`messages`: a conversation in which the assistant speaks."""
    messages = value_of(row, "messages")
    check_conversation(messages, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("messages: no message is the assistant's, so there is nothing to learn")


def check_preference(row: Row, chat: bool) -> None:
    """`chosen` and `rejected` [, `prompt`]: texts, or lists of messages."""
    keys = ["chosen", "rejected"] + (["prompt"] if row.get("prompt") is not None else [])
    kinds = {_spoken(row, key, True) for key in keys}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(keys)} mix texts and lists; write all alike")
    if row["chosen"] == row["rejected"]:
        raise ValueError("chosen and rejected are the same, so there is nothing to prefer")


def check_prompt(row: Row, chat: bool) -> None:
    """`prompt`: a text, or a list of messages; other columns are kept for rewards."""
    _spoken(row, "prompt", True)


def check_classification(row: Row, chat: bool) -> None:
    """`text` [, `text_pair`] and `label`: a class by name or number, a list of them, or a value."""
    text_of(row, "text")
    if "text_pair" in row:
        text_of(row, "text_pair")
    if row.get("label") == []:  # of no class
        return
    if isinstance(row.get("label"), list):
        list_of(row, "label", str | int)
    else:
        check_label(row)


def check_token_classification(row: Row, chat: bool) -> None:
    """`tokens` and `tags`: as many tags as words."""
    tokens, tags = list_of(row, "tokens", str), list_of(row, "tags", str | int)
    if len(tokens) != len(tags):
        raise ValueError(f"{len(tokens)} tokens have {len(tags)} tags; give each token one")


def check_image(row: Row, chat: bool) -> None:
    """`image`, of which the head is read, and `label`."""
    _check_opens(value_of(row, "image"))
    check_label(row)


def check_choices(row: Row, chat: bool) -> None:
    """`question`, `choices` and `answer`: a position from 0, a letter, or a choice."""
    text_of(row, "question")
    choices, answer = list_of(row, "choices", str), value_of(row, "answer")
    allowed = {*choices, *string.ascii_letters[: len(choices)], *map(str, range(len(choices)))}
    allowed |= {letter.upper() for letter in string.ascii_letters[: len(choices)]}
    if str(answer) not in allowed:
        raise ValueError(
            f"answer: got {answer!r}, allowed is 0 to {len(choices) - 1}, a letter, or a choice"
        )


def check_tokenised(row: Row, chat: bool) -> None:
    """`input_ids` [, `labels`, `attention_mask`], all as long."""
    ids = list_of(row, "input_ids", int)
    if min(ids) < 0:
        raise ValueError(f"input_ids: got {min(ids)}; ids count from 0")
    for key in ("labels", "attention_mask"):
        if row.get(key) is not None and len(list_of(row, key, int)) != len(ids):
            raise ValueError(f"{key}: got {len(row[key])} of them for {len(ids)} input_ids")
    odd = [label for label in row.get("labels") or () if label < 0 and label != NO_LABEL]
    if odd:
        raise ValueError(f"labels: got {odd[0]}, allowed is {NO_LABEL} (no label), or an id")


def check_alpaca(row: Row, chat: bool) -> None:
    """`instruction` [, `input`, `system`] and `output`: texts."""
    text_of(row, "instruction")
    text_of(row, "output")
    for key in ("input", "system"):
        if row.get(key) is not None:
            text_of(row, key)


def from_alpaca(row: Row, chat: bool) -> Row:
    """Ask by instruction and input; as messages, or as text where a task reads no chats."""
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    system = row.get("system")
    if not chat:
        return {"prompt": "\n\n".join(filter(None, (system, asked))), "completion": row["output"]}
    before = [{"role": "system", "content": system}] if system else []
    return {
        "prompt": [*before, {"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def check_sharegpt(row: Row, chat: bool) -> None:
    """`conversations`: a list of {from, value}."""
    turns = value_of(row, "conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations: {_shown(turns)}; expected a list of from and value")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"conversations: turn {number}: {_shown(turn)} lacks from or value")
        if turn["from"] not in SPEAKERS:
            raise ValueError(
                f"conversations: turn {number}: from: got {turn['from']!r}, "
                f"allowed is {', '.join(SPEAKERS)}"
            )
        if not isinstance(turn["value"], str):
            raise ValueError(f"conversations: turn {number}: value: {_shown(turn['value'])}")
    check_messages(from_sharegpt(row, chat), chat)


def from_sharegpt(row: Row, chat: bool) -> Row:
    """Name the speakers as chat templates do; a system prompt beside the turns goes first."""
    system = row.get("system")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    turns = [{"role": SPEAKERS[t["from"]], "content": t["value"]} for t in row["conversations"]]
    return {"messages": [*before, *turns]}


def check_pair(row: Row, chat: bool) -> None:
    """`source` and `target`: texts."""
    text_of(row, "source")
    text_of(row, "target")


def from_pair(row: Row, chat: bool) -> Row:
    """Call the source a prompt, and the target its completion."""
    return {"prompt": row["source"], "completion": row["target"]}


def to_messages(row: Row, chat: bool) -> Row:
    """Join a prompt and a completion that are lists of messages."""
    return {"messages": [*row["prompt"], *row["completion"]]}


def check_conversation(messages: Any, key: str) -> None:
    """Raise unless a value is a list of messages, each with a role and a content."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key}: {_shown(messages)}; expected a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{key}: message {number}: {_shown(message)} has no role")
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise ValueError(f"{key}: message {number}: content: {_shown(content)}")


def check_label(row: Row) -> None:
    """Raise unless `label` is a class or a value."""
    label = value_of(row, "label")
    if not isinstance(label, str | int | float) or label != label:
        raise ValueError(f"label: {_shown(label)}; expected a name or a number")


def value_of(row: Row, key: str) -> Any:
    """Return a value that must be there."""
    if row.get(key) is None:
        raise ValueError(f"{key!r} is missing")
    return row[key]


def text_of(row: Row, key: str) -> str:
    """Return a value that must be a text."""
    value = value_of(row, key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} holds {_shown(value)}; expected a text")
    return value


def list_of(row: Row, key: str, kind: Any) -> list[Any]:
    """Return a value that must be a list of something, not empty."""
    value = value_of(row, key)
    if not isinstance(value, list) or not value or not all(isinstance(v, kind) for v in value):
        inner = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{key!r} holds {_shown(value)}; expected a list of {inner}")
    return value


def _spoken(row: Row, key: str, chat: bool) -> str:
    """Check a text or a list of messages; return which of both it is."""
    value = value_of(row, key)
    if isinstance(value, list) and chat:
        check_conversation(value, key)
        return "messages"
    text_of(row, key)
    return "text"


def _check_opens(image: Any) -> None:
    """Raise unless a file, or bytes, begin as an image does."""
    from PIL import Image

    if not isinstance(image, dict):  # it is open
        return
    path, content = image.get("path"), image.get("bytes")
    if content is None and "://" in str(path):
        return
    try:
        Image.open(str(path) if content is None else io.BytesIO(content)).close()
    except FileNotFoundError as error:
        raise ValueError(f"image: {path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"image: {path or 'its bytes'}: is no image that can be read") from error


def _shown(value: Any) -> str:
    """Name a value and its type, shortly."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
