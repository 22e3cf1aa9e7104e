"""`method: {name: full}`: train the model's own weights, all of them or those that are named."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import nn

from sft.errors import unknown_name
from sft.quantization import is_quantized


@dataclass(kw_only=True)
class FullConfig:
    """Train weights of the model itself, without an adapter.

    Args:
        modules: names of the modules and parameters to train, or their last parts: "lm_head",
            "q_proj", "layers.0", with `*` for any characters. By default everything is trained.

    Raises:
        ValueError: the list is empty.
    """

    modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.modules is not None and not self.modules:
            raise ValueError("modules: got [], allowed is a list of names; null trains everything")


class Full:
    """The kind of method that trains the model's own weights."""

    saved: ClassVar[bool] = False
    from_scratch = False

    def __init__(self, name: str, fields: dict[str, Any], task_type: str | None) -> None:
        self.name = name
        self.config = FullConfig(**fields)

    @classmethod
    def names(cls) -> list[str]:
        """Return its one name."""
        return ["full"]

    @classmethod
    def config_class(cls, name: str) -> type:
        """Return its configuration."""
        return FullConfig

    @classmethod
    def hidden(cls, name: str) -> frozenset[str]:
        """Return nothing: all fields can be set."""
        return frozenset()

    def unmerged(self) -> None:
        """Return nothing: the model is its own merged form."""

    def attach(self, model: nn.Module, spec: Any) -> nn.Module:
        """Freeze what is not trained.

        Raises:
            ValueError: a name matches nothing, or the weights are packed.
        """
        if is_quantized(model):
            raise ValueError(
                "name: got 'full', which trains the model's own weights, and packed ones cannot "
                "move; leave model.quantization out, or take an adapter such as spiel or s2ft"
            )
        train_only(model, self.config.modules)
        return model

    def counts(self, model: nn.Module) -> tuple[int, int]:
        """Return the number of trained weights, and of all."""
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def untrained(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Run the model as it stands: there is nothing to take off."""
        return contextlib.nullcontext()

    trained = untrained


def train_only(model: nn.Module, names: list[str] | None) -> None:
    """Let exactly the named modules and parameters require a gradient.

    Args:
        model: all its floating point parameters can be trained.
        names: whole names or last parts of them, with `*`; None trains everything. A tensor that
            is shared, such as a tied head, is trained if one of its names is given.

    Raises:
        ValueError: a name matches nothing.
    """
    chosen = set()
    for pattern in ["*"] if names is None else names:
        found = {id(p) for owner in _matched(model, pattern) for p in _parameters(owner)}
        if not found:
            known = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
            raise ValueError(f"modules: {pattern!r}: {unknown_name(pattern, known, kind='name')}")
        chosen |= found
    for parameter in model.parameters():
        trained = id(parameter) in chosen and parameter.is_floating_point()
        parameter.requires_grad_(trained)


def _matched(model: nn.Module, pattern: str) -> list[Any]:
    """Return the modules and parameters whose name, or the end of it, fits the pattern."""
    named = [*model.named_modules(remove_duplicate=False)]
    named += [*model.named_parameters(remove_duplicate=False)]
    return [
        owner
        for name, owner in named
        if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    ]


def _parameters(owner: Any) -> list[nn.Parameter]:
    return [*owner.parameters()] if isinstance(owner, nn.Module) else [owner]
