"""Find out where a model reads its trained tensors, by watching one forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LOOK_UPS = (functional.embedding, torch.embedding)
# accessors of a tensor that hand out its values; all others, such as .shape, read none
VALUES = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data", "real"))

Owned = dict[nn.Module, list[nn.Parameter]]


@dataclass
class Reads:
    """What one forward pass read; modules and parameters by `id`."""

    order: list[nn.Module] = field(default_factory=list)  # modules that hold any, as first run
    looked_up: set[tuple[int, int]] = field(default_factory=set)  # (module, parameter): rows of it
    whole: set[tuple[int, int]] = field(default_factory=set)  # (module, parameter): all of it
    elsewhere: set[int] = field(default_factory=set)  # parameters, while no owner of theirs ran

    @property
    def anywhere(self) -> set[int]:
        """Parameters that anything read at all."""
        return {p for _, p in self.looked_up | self.whole} | self.elsewhere


def owners(model: nn.Module, parameters: set[int]) -> Owned:
    """Return the modules that directly hold parameters of a set of `id`s, and which."""
    found = {
        module: [p for p in module.parameters(recurse=False) if id(p) in parameters]
        for module in model.modules()
    }
    return {module: held for module, held in found.items() if held}


def watch(owned: Owned, forward: Callable[[], object]) -> Reads:
    """Run `forward` once, without gradients, and note which functions read what, and where."""
    watcher = _Watcher(owned)
    handles = [
        handle
        for module in owned
        for handle in (
            module.register_forward_pre_hook(watcher.enter),
            module.register_forward_hook(watcher.leave, always_call=True),
        )
    ]
    try:
        with watcher, torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return watcher.reads


class _Watcher(TorchFunctionMode):
    """Sees every torch function while it is entered."""

    def __init__(self, owned: Owned) -> None:
        super().__init__()
        self.reads = Reads()
        self._owned = owned
        # for each parameter the modules that hold it and run now, the innermost last
        self._running: dict[int, list[nn.Module]] = defaultdict(list)
        self._known = {id(p) for held in owned.values() for p in held}

    def enter(self, module: nn.Module, *_: Any) -> None:
        for parameter in self._owned[module]:
            self._running[id(parameter)].append(module)
        if module not in self.reads.order:
            self.reads.order.append(module)

    def leave(self, module: nn.Module, *_: Any) -> None:
        for parameter in self._owned[module]:
            self._running[id(parameter)].pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        accessor = getattr(func, "__name__", "") == "__get__" and func not in VALUES
        for key in () if accessor else self._parameters(args, kwargs):
            self._note(key, func)
        return func(*args, **kwargs)

    def _note(self, parameter: int, func: Any) -> None:
        running = self._running[parameter]
        if not running:
            self.reads.elsewhere.add(parameter)
            return
        where = self.reads.looked_up if func in LOOK_UPS else self.reads.whole
        where.add((id(running[-1]), parameter))

    def _parameters(self, args: Any, kwargs: dict[str, Any]) -> Iterator[int]:
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, Tensor) and id(item) in self._known:
                    yield id(item)
