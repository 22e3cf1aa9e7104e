"""Units chosen by what flows through the consumers while batches run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sft.adapters.ranks import ALONE, Ranks
from sft.adapters.slices.selection import column_norms
from sft.adapters.slices.units import UnitGroup
from sft.kernels.outer_at import rows_per_block

SHARE = 0.01  # of the training batches, as in S2FT's paper (arXiv 2412.06289)
UNKNOWN_LENGTH = 8  # batches, where the number of all batches is not known


class UnitCalibration:
    """Scores the input features h of each group's consumer D over the tokens of some batches.

    activation: mean of |h_j|. product: ||D[:, j]||_2 times the root of the mean of h_j^2.
    gradient: root of the sum over batches of ||(g^T h)[:, j]||^2, where g is the gradient of the
    consumer's output, so g^T h that of D. Sums are taken in float32 and leave padding out. S2FT's
    paper names these scores without formulas.

    Args:
        model: the base model.
        groups: what is scored.
        selection: one of the three.
        num_batches: how many batches are read; None for 1 % of them.
        read: returns the (out, in) weight of a module.
        settle: takes the scores by group name, and chooses.
        own_order: keeps the model in its own order for a block: features are counted in it.
    """

    ranks: Ranks = ALONE

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        selection: str,
        num_batches: int | None,
        read: Callable[[str], Tensor],
        settle: Callable[[dict[str, Tensor]], None],
        own_order: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.backward = selection == "gradient"
        self._model, self._groups, self._selection = model, groups, selection
        self._num_batches, self._read, self._settle = num_batches, read, settle
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._split = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._masks = Masks({}, split=self._split)
        self._handles: list[RemovableHandle] = []
        self._own_order, self._held = own_order, ExitStack()

    def num_batches(self, available: int | None) -> int:
        """Return the configured number, or 1 % of what there is."""
        if self._num_batches is not None:
            return self._num_batches
        return UNKNOWN_LENGTH if available is None else max(1, math.ceil(SHARE * available))

    def open(self) -> None:
        """Listen to the consumers."""
        self._held.enter_context(self._own_order())
        for consumer in dict.fromkeys(group.consumer for group in self._groups):
            module = self._model.get_submodule(consumer)
            self._handles.append(module.register_forward_hook(self._hook(consumer)))

    def before_batch(self, batch: Mapping[str, Any]) -> None:
        """Note the padding."""
        self._masks = Masks(batch, split=self._split)

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._held.close()

    def choose(self, count: int) -> None:
        """Choose by the scores."""
        if not self.backward:
            self._share()
        unseen = [group.consumer for group in self._groups if group.consumer not in self._sums]
        if unseen:
            raise ValueError(
                f"calibration: {unseen[0]!r} was not reached by {count} batches ({len(unseen)} "
                "such modules); leave it out with exclude_modules or choose selection='random'"
            )
        self._settle({group.name: self._score(group.consumer).cpu() for group in self._groups})

    def _share(self) -> None:
        """Let sums and counts be the means over the ranks; their ratio is that of all tokens."""
        if self.ranks.count == 1:
            return
        consumers = list(dict.fromkeys(group.consumer for group in self._groups))
        held = [self._sums.get(name, torch.zeros(0)) for name in consumers]
        tokens = self.ranks.gather([float(self._tokens.get(name, 0)) for name in consumers])
        # of the ranks that saw it: to read a weight may take all of them
        widths = self.ranks.gather([float(len(sums)) for sums in held])
        for consumer, sums, counts, lengths in zip(
            consumers, held, zip(*tokens, strict=True), zip(*widths, strict=True), strict=True
        ):
            if not any(counts):
                continue
            mine = sums if len(sums) else torch.zeros(int(max(lengths)))
            self._sums[consumer] = self.ranks.mean(mine) * self.ranks.count
            self._tokens[consumer] = int(sum(counts))

    def _score(self, consumer: str) -> Tensor:
        sums, tokens = self._sums[consumer], max(1, self._tokens[consumer])
        if self._selection == "activation":
            return sums / tokens
        if self._selection == "product":
            return column_norms(self._read(consumer)) * (sums.cpu() / tokens).sqrt()
        return sums.sqrt()

    def _hook(self, consumer: str) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x: Tensor = args[0].detach()
            h = self._masks.keep(consumer, x)
            if not self.backward:
                self._add(consumer, h, h.abs() if self._selection == "activation" else h.square())
            elif torch.is_grad_enabled():  # not the first pass of a checkpointed block
                if not output.requires_grad:
                    output.requires_grad_()
                output.register_hook(lambda g: self._add_product(consumer, x, g.detach()))

        return listen

    def _add(self, consumer: str, h: Tensor, terms: Tensor) -> None:
        held = self._sums.get(consumer)
        sums = terms.sum(dim=0)
        self._sums[consumer] = sums if held is None else held + sums
        self._tokens[consumer] = self._tokens.get(consumer, 0) + len(h)

    def _add_product(self, consumer: str, x: Tensor, g: Tensor) -> None:
        """Add the squared column norms of g^T h, row block by row block."""
        h, g = self._masks.keep(consumer, x), self._masks.keep(consumer, g)
        step = rows_per_block(h.shape[1], 4)
        for start in range(0, g.shape[1], step):
            block = self.ranks.mean(g[:, start : start + step].t() @ h)
            self._add(consumer, h, block.square())


class Masks:
    """Which tokens of a batch are no padding.

    Args:
        batch: keyword arguments of the model.
        split: the model has an encoder and a decoder, with a mask each.
    """

    def __init__(self, batch: Mapping[str, Any], *, split: bool) -> None:
        self._mask = batch.get("attention_mask")
        self._decoder = batch.get("decoder_attention_mask")
        labels = batch.get("labels")
        if self._decoder is None and isinstance(labels, Tensor):
            self._decoder = labels != -100
        self._split = split

    def keep(self, module: str, features: Tensor) -> Tensor:
        """Return the features of the tokens that count: (tokens, n) float32.

        Features of a shape that the mask has not (images, packed sequences) count whole.
        """
        flat = features.reshape(-1, features.shape[-1]).float()
        mask = self._decoder if self._split and "decoder" in module.split(".") else self._mask
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() != len(flat):
            return flat
        return flat[mask.reshape(-1).bool().to(flat.device)]
