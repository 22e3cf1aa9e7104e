"""Frozen weights that come to the device only while they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sft.adapters.gathered import OFFLOADED, Gathering
from sft.adapters.geometry import layer_kind
from sft.offload.feed import Feed
from sft.offload.store import DiskStore, MemoryStore, Store

SMALLEST = 4096  # entries; norms and biases stay


class OffloadedBase:
    """Keeps the large frozen weights of a model off its device, until `close`.

    A weight comes when its layer runs and goes right after. Backward does not keep it either: what
    autograd would save of it is a note, and the weight comes once more when backward reads it. So
    checkpointing is free to be on or off: with it a block's weights are alive together while the
    block is recomputed.

    Args:
        model: with its adapters in place. What is trained stays where it is, as does the head.
        device: where the model runs.
        folder: where files go; None keeps the weights in memory.

    Raises:
        ValueError: no weight of the model can be offloaded.
    """

    def __init__(self, model: nn.Module, device: torch.device, folder: Path | None = None) -> None:
        owners = _owners(model)
        if not owners:
            raise ValueError(
                "offload.base: got a model without a frozen weight to offload; leave it out, or "
                "train less of the model"
            )
        self._model = model
        self._store: Store = MemoryStore(device) if folder is None else DiskStore(folder, device)
        self._feed = Feed(self._store, device)
        self._weights: dict[int, _Weight] = {}
        self._here: dict[int, int] = {}  # by address, what has come
        self._saving = ExitStack()
        for target, parameters in owners.values():
            for parameter in parameters:
                self._send_away(parameter)
            add_hook_to_module(target, _Fetch(self, parameters), append=True)
        self._targets = [target for target, _ in owners.values()]
        self._gathering = Gathering(self._gather)
        self._hooks = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for table in _adapted_tables(model):
            if id(table.weight) in self._weights:
                self._hooks += _around_files(table, self._show)

    @property
    def numel(self) -> int:
        """How many weights lie elsewhere."""
        return sum(weight.shape.numel() for weight in self._weights.values())

    @property
    def hits(self) -> int:
        """How often a weight was on its way when it was wanted."""
        return self._feed.hits

    def fetch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let these parameters hold their weights."""
        for parameter in parameters:
            weight = self._weights[id(parameter)]
            weight.users += 1
            if weight.users == 1:
                parameter.data = self._feed.fetch(weight.key)
                self._here[parameter.untyped_storage().data_ptr()] = id(parameter)

    def release(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let these parameters be empty again, unless another still uses them."""
        for parameter in parameters:
            weight = self._weights[id(parameter)]
            weight.users -= 1
            if weight.users == 0:
                self._here.pop(parameter.untyped_storage().data_ptr(), None)
                parameter.data = _nothing(parameter)

    def close(self) -> None:
        """Bring all weights back to where they came from, and delete the files."""
        if not self._weights:
            return
        self._gathering.remove()
        for hook in self._hooks:
            hook.remove()
        for target in self._targets:
            remove_hook_from_module(target)
        for weight in self._weights.values():
            weight.parameter.data = self._store.read(weight.key).to(weight.home)
            delattr(weight.parameter, OFFLOADED)
        self._weights.clear()
        self._here.clear()
        self._feed.close()
        self._store.close()

    def _send_away(self, parameter: nn.Parameter) -> None:
        if id(parameter) in self._weights:
            return
        key = len(self._weights)
        home, shape = parameter.device, parameter.shape
        self._weights[id(parameter)] = _Weight(parameter, key, shape, home)
        self._store.put(key, parameter)
        parameter.data = _nothing(parameter)
        setattr(parameter, OFFLOADED, True)

    @contextmanager
    def _gather(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Let `sft.adapters.gathered` read these, and write to them."""
        mine = [self._weights[id(t)].parameter for t in tensors if id(t) in self._weights]
        self.fetch(mine)
        versions = [parameter._version for parameter in mine]
        try:
            yield
        finally:
            for parameter, version in zip(mine, versions, strict=True):
                if parameter._version != version:
                    self._store.put(self._weights[id(parameter)].key, parameter)
            self.release(mine)

    def _show(self, table: nn.Embedding, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Put a table into a state dict: PEFT saves that of an adapted embedding."""
        weight = self._weights.get(id(table.weight))
        if weight is not None:
            state[prefix + "weight"] = self._store.read(weight.key).to(weight.home)

    # -- backward ------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any) -> None:
        for weight in self._weights.values():  # of a forward that raised
            if weight.users:
                weight.users = 1
                self.release([weight.parameter])
        if torch.is_grad_enabled():
            self._saving.enter_context(saved_tensors_hooks(self._note, self._recall))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._saving.close()

    def _note(self, tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided or not tensor.numel():
            return tensor
        found = self._here.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        key = self._weights[found].key
        return _Note(key, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _recall(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Note):
            assert isinstance(saved, Tensor)
            return saved
        key, size, stride, offset = saved
        return self._feed.fetch(key).as_strided(size, stride, offset)


class _Weight:
    """A parameter whose content lies in the store."""

    def __init__(
        self, parameter: nn.Parameter, key: int, shape: torch.Size, home: torch.device
    ) -> None:
        self.parameter, self.key, self.shape, self.home = parameter, key, shape, home
        self.users = 0


class _Note(NamedTuple):
    """What backward is to read of a weight."""

    key: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Fetch(ModelHook):  # type: ignore[misc]
    """Lets a module's weights come before it runs, and go after."""

    def __init__(self, base: OffloadedBase, parameters: Sequence[nn.Parameter]) -> None:
        self._base, self._parameters = base, parameters

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Fetch."""
        self._base.fetch(self._parameters)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Release."""
        self._base.release(self._parameters)
        return output


def _around_files(table: Any, show: Callable[..., None]) -> list[Any]:
    # torch marks a hook that it is given, which takes no bound method
    return [
        table.register_state_dict_post_hook(partial(show)),
        table.register_load_state_dict_pre_hook(_leave_out),
    ]


def _leave_out(table: nn.Embedding, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a file's table, the frozen one that is in the store, be what the parameter holds."""
    if prefix + "weight" in state:
        state[prefix + "weight"] = table.weight.detach()


def _adapted_tables(model: nn.Module) -> list[nn.Embedding]:
    found = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return [table for table in found if isinstance(table, nn.Embedding)]


_Owners = dict[int, tuple[nn.Module, list[nn.Parameter]]]


def _owners(model: nn.Module) -> _Owners:
    """Return by identity the modules that are to be watched, and the weights that they read.

    An adapter's layer reads the weight of the layer it wraps.
    """
    stay = _of_the_head(model)
    found: _Owners = {}
    within: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for part in module.modules():
                within.setdefault(id(part), module)
        if layer_kind(module) is None:
            continue
        wanted = [
            parameter
            for parameter in module.parameters(recurse=False)
            if not parameter.requires_grad
            and id(parameter) not in stay
            and parameter.is_floating_point()
            and parameter.numel() >= SMALLEST
        ]
        if wanted:
            target = within.get(id(module), module)
            found.setdefault(id(target), (target, []))[1].extend(wanted)
    return found


def _of_the_head(model: nn.Module) -> set[int]:
    """Return the parameters of the output head: a loss multiplies with them by itself."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return set() if head is None else {id(parameter) for parameter in head.parameters()}


def _nothing(parameter: Tensor) -> Tensor:
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
