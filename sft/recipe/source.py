"""YAML as people expect it, with the line of every key kept for the error messages.

Unlike PyYAML's defaults (YAML 1.1): `1e-3` is a number, only true/false are booleans (so that
`save_strategy: no` stays a word), and a key written twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sft.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans."""


_REPLACED = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Source:
    """Values of one recipe and where each of them was written."""

    name: str
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Return `file:line` of a dotted key, of its nearest written ancestor, or its override."""
        parts = key.split(".")
        ways = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        for way in ways:  # an override replaces all that the file says below it
            if way in self.overrides:
                return f"override '{self.overrides[way]}'"
        lines = (f"{self.name}:{self.lines[way]}" for way in ways if way in self.lines)
        return next(lines, self.name)

    def error(self, key: str, message: str) -> RecipeError:
        """Build the error of one key."""
        return RecipeError(f"{self.where(key)}: {key}: {message}")


def read(path: Path) -> Source:
    """Read a recipe file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text") from error
    return parse(text, path.name)


def parse(text: str, name: str) -> Source:
    """Parse the text of a recipe; `name` stands for the file in messages."""
    loader = _Loader(text)
    lines: dict[str, int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{name}: is empty; start from one of `sft recipes list`")
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{name}:1: expected `key: value` lines, found something else")
        _walk(node, "", name, lines)
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
    return Source(name, values, lines)


def apply_overrides(source: Source, overrides: Iterable[str]) -> Source:
    """Return the source with `a.b=value` settings laid over it; values are YAML."""
    values = _copy(source.values)
    written = dict(source.overrides)
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
            raise RecipeError(f"override '{text}': expected dotted.key=value")
        try:
            value = yaml.load(raw, Loader=_Loader)  # a SafeLoader
        except yaml.YAMLError as error:
            raise RecipeError(f"override '{text}': {key}: the value is not valid YAML") from error
        written[key] = text
        _assign(values, key.split("."), value, text)
    return Source(source.name, values, source.lines, written)


def _walk(node: yaml.Node, prefix: str, name: str, lines: dict[str, int]) -> None:
    """Note the line of every key below a node; refuse a key written twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = item.start_mark.line + 1
            _walk(item, f"{prefix}{index}.", name, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in lines:
            raise RecipeError(
                f"{name}:{line}: {key}: written twice (first on line {lines[key]}); keep one"
            )
        lines[key] = line
        _walk(value_node, f"{key}.", name, lines)


def _assign(values: dict[str, Any], path: list[str], value: Any, text: str) -> None:
    """Set a nested key, making the sections on the way."""
    for depth, part in enumerate(path[:-1], 1):
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise RecipeError(f"override '{text}': {'.'.join(path[:depth])} is not a section")
    values[path[-1]] = value


def _copy(value: Any) -> Any:
    """Copy nested dicts and lists, so that overrides never write into their source."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
