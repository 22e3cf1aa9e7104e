"""Evaluate at displaced weights without ever writing to the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sft.kernels.displace import displace
from sft.optim.zeroth_order.ahead import Ahead
from sft.optim.zeroth_order.modes import Draws, nothing
from sft.optim.zeroth_order.reads import Owned, Reads, owners, watch
from sft.optim.zeroth_order.rows import DisplacedRows
from sft.optim.zeroth_order.scratch import Scratch, size_of
from sft.optim.zeroth_order.trained import Trained

logger = logging.getLogger(__name__)


class ExactMode:
    """Each module computes with a displaced copy of its weights, which lives while it runs.

    Before a module that holds trained tensors runs, w - sum_q c_q z_q is put into a scratch and
    stands in for them; afterwards the tensors are the model's own again, the very same memory. The
    scratch is as large as the largest such module. Of an embedding only the rows that are looked up
    are made. Tensors that are read outside the modules that hold them (the values of an adapter
    kept in a dictionary, a weight that another module multiplies by) are copied whole.

    Args:
        model: what is evaluated; hooks stay on it until `close`.
        trained: the trained set.
        kind: of the noise.
        forward: runs the model once, as in training, to see where it reads what.
        after: called when copied tensors have changed, to write them to where they are used.

    Source: the memory-efficient form of Sparse MeZO, arXiv 2402.15751, for any module.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Sequence[Trained],
        kind: str,
        forward: Callable[[], object],
        after: Callable[[], None] = nothing,
    ) -> None:
        by_id = {id(t.parameter): t for t in trained}
        owned = owners(model, set(by_id))
        self.reads = watch(owned, forward)
        copied = _copied(trained, owned, self.reads)
        self.copied = [t for t in trained if id(t.parameter) in copied]
        _warn_of_unread(trained, self.reads)
        self._kind, self._after = kind, after
        self._draws: Draws = ()
        self._originals: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._handles: list[Any] = []
        # modules that run now, the innermost last, and the parameters that they displace, by `id`
        self._running: list[tuple[nn.Module, ExitStack]] = []
        self._standing: set[int] = set()
        served = {
            module: [by_id[id(p)] for p in owned[module] if id(p) not in copied]
            for module in [*self.reads.order, *(m for m in owned if m not in self.reads.order)]
        }
        rows = {m: [t for t in mine if _by_rows(m, t, self.reads)] for m, mine in served.items()}
        whole = {m: [t for t in mine if t not in rows[m]] for m, mine in served.items()}
        sizes = [sum(size_of(t.parameter) for t in mine) for mine in whole.values()]
        self._scratch = Scratch(max(sizes, default=0), trained[0].parameter.device)
        self._ahead = Ahead([mine for mine in whole.values() if mine], kind)
        for module in served:
            self._serve(module, whole[module], rows[module])

    def move(self, draws: Draws) -> None:
        """Let the model compute with w - sum_q c_q z_q from now on; with () with w."""
        self._draws = tuple(draws)
        if self.copied:
            self._put_back()
            if draws:
                self._stand_in()
            self._after()

    def settle(self) -> None:
        """Let the model compute with w again; it was never written to."""
        while self._running:  # torch leaves out the hooks when a KeyboardInterrupt passes
            self._running.pop()[1].close()
        self.move(())

    def close(self) -> None:
        """Settle, and take the hooks off."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._copies.clear()

    def _stand_in(self) -> None:
        """Put displaced copies in the place of the tensors that are copied whole."""
        self._originals = [t.parameter.data for t in self.copied]
        self._copies = self._copies or [torch.empty_like(w) for w in self._originals]
        displace(
            self._originals,
            [t.id for t in self.copied],
            self._draws,
            kind=self._kind,
            masks=[t.mask for t in self.copied],
            out=self._copies,
        )
        for t, copy in zip(self.copied, self._copies, strict=True):
            t.parameter.data = copy

    def _put_back(self) -> None:
        if self._originals:
            for t, original in zip(self.copied, self._originals, strict=True):
                t.parameter.data = original
        self._originals = []

    def _serve(self, module: nn.Module, whole: list[Trained], rows: list[Trained]) -> None:
        """Let one module run on displaced weights whenever the mode has moved."""

        def enter(*_: Any) -> None:
            stack = ExitStack()
            self._running.append((module, stack))
            if self._draws and (left := self._left(whole)):
                stack.enter_context(self._displaced(left))
            for t in self._left(rows) if self._draws else ():
                stack.enter_context(DisplacedRows(t, self._draws, self._kind))

        def leave(*_: Any) -> None:
            if self._running and self._running[-1][0] is module:
                self._running.pop()[1].close()

        self._handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]

    def _left(self, trained: list[Trained]) -> list[Trained]:
        """Return those that no module around this one displaces, such as a tied bias's owner."""
        return [t for t in trained if id(t.parameter) not in self._standing]

    @contextmanager
    def _displaced(self, trained: list[Trained]) -> Iterator[None]:
        """Let tensors point at displaced copies in the scratch."""
        mark, keys = self._scratch.mark(), {id(t.parameter) for t in trained}
        originals = [t.parameter.data for t in trained]
        try:
            copies = [self._scratch.take(w) for w in originals]
            displace(
                originals,
                [t.id for t in trained],
                self._draws,
                kind=self._kind,
                masks=[t.mask for t in trained],
                out=copies,
                drawn=self._ahead.drawn(trained, self._draws),
            )
            self._standing |= keys
            for t, copy in zip(trained, copies, strict=True):
                t.parameter.data = copy
            yield
        finally:
            for t, original in zip(trained, originals, strict=True):
                t.parameter.data = original
            self._standing -= keys
            self._scratch.release(mark)


def _warn_of_unread(trained: Sequence[Trained], reads: Reads) -> None:
    read = reads.anywhere
    unread = [t.name for t in trained if id(t.parameter) not in read]
    if unread:
        logger.warning(
            "model: the first batch does not read %d of the trained tensors; what no batch reads "
            "is moved by noise alone, freeze it: %s",
            len(unread),
            ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else ""),
        )


def _copied(trained: Sequence[Trained], owned: Owned, reads: Reads) -> set[int]:
    """Return the parameters that no module can serve: read elsewhere, or in a mere container."""
    callable_owner = {id(p) for module, held in owned.items() if _is_called(module) for p in held}
    return {
        id(t.parameter)
        for t in trained
        if id(t.parameter) in reads.elsewhere or id(t.parameter) not in callable_owner
    }


def _is_called(module: nn.Module) -> bool:
    containers = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)
    return not isinstance(module, containers)


def _by_rows(module: nn.Module, trained: Trained, reads: Reads) -> bool:
    """Whether a module looks rows of the tensor up, and does nothing else with it."""
    pair = (id(module), id(trained.parameter))
    plain = getattr(module, "max_norm", None) is None
    return plain and pair in reads.looked_up and pair not in reads.whole
