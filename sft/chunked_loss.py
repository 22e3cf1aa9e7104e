"""The loss of a causal language model whose logits are never whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from sft.adapters.gathered import is_partitioned
from sft.kernels.linear_cross_entropy import (
    Tail,
    apply_tail,
    chunk_rows,
    linear_cross_entropy,
    whole_cross_entropy,
)
from sft.optim.shards import is_sharded

IGNORED = -100
KEEP = "leave chunked_loss out"


class UnknownLogits(ValueError):
    """A model does something to its logits that is not known here."""


def chunked_nll(
    model: Any,
    inputs: dict[str, Any],
    count: Any = None,
    *,
    rows: int | None = None,
    compare: bool = False,
) -> tuple[Tensor, Any]:
    """Return the negative log-likelihood of the labels, over `count` or their number.

    The model runs as always, wrapped or not, but its output head is handed no positions; what the
    head would have read is multiplied out a chunk at a time, and only where there are labels.

    Args:
        model: a causal language model.
        inputs: its inputs with labels (batch, length); -100 marks no label.
        count: what the sum is divided by: the labels of all micro-batches of an update.
        rows: how many labels a chunk has; by default a rule of the vocabulary.
        compare: hold the logits of the first position against the model's own.

    Returns:
        The loss, and the model's outputs, whose logits are of no positions.

    Raises:
        ValueError: the head reads something else than one row a position.
        UnknownLogits: the model does something to its logits that is not known here.
    """
    base = causal_model(model)
    head, tail = base.get_output_embeddings(), tail_of(base.config)
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    labels = inputs["labels"][:, 1:]
    halves: list[torch.dtype] = []
    with head_input(head, positions=int(compare), halves=halves) as read:
        outputs = model(**rest, use_cache=False)
    if len(read) != 1 or read[0].dim() != 3 or read[0].shape[1] != labels.shape[1] + 1:
        shapes = [tuple(tensor.shape) for tensor in read]
        raise ValueError(
            f"chunked_loss: got a head of {type(base).__name__} that reads {shapes}, allowed is "
            f"(batch, length, width) once; {KEEP}"
        )
    labels = labels.to(read[0].device)
    wanted = labels != IGNORED
    size = rows or chunk_rows(base.config.get_text_config().vocab_size)
    with autocast_as(read[0], halves):
        if compare:
            compare_logits(head, read[0][:, :1], outputs.logits, tail, type(base).__name__)
        total = head_nll(head, read[0][:, :-1][wanted], labels[wanted], tail, size)
    divisor = wanted.sum().clamp(min=1) if count is None else torch.as_tensor(count)
    loss = total / divisor.to(total.device)
    balance = getattr(outputs, "aux_loss", None)  # of a mixture of experts that is asked for it
    if balance is not None:
        loss = loss + base.config.router_aux_loss_coef * balance.to(loss.device)
    return loss, outputs


def head_nll(head: nn.Module, x: Tensor, targets: Tensor, tail: Tail, rows: int) -> Tensor:
    """Return the sum of the negative log-likelihoods, a chunk of rows at a time.

    A plain head is multiplied out here. Any other, with an adapter, hooks or a part of its weight,
    runs as it is, and once more in backward, so that all it does to gradients is done.

    Args:
        head: the output embeddings.
        x: (n, d), what the head reads.
        targets: (n,) int64.
        tail: what the model does to its logits.
        rows: how many rows a chunk has.
    """
    if _plain(head):
        weight, bias = head.weight, head.bias
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        return linear_cross_entropy(x, weight, bias, targets, tail=tail, rows=rows)
    parts = []
    for chunk in range(_chunks(head, x, rows)):
        part = slice(chunk * rows, (chunk + 1) * rows)
        # a sharder's weights are of other shapes when backward begins than they were in forward
        parts.append(
            checkpoint(
                _chunk_nll, head, x[part], targets[part], tail,
                use_reentrant=False, determinism_check="none",
            )
        )  # fmt: skip
    return torch.stack(parts).sum()


def _chunks(head: nn.Module, x: Tensor, rows: int) -> int:
    """Return how many chunks there are: one at least, and equally many where ranks share a head.

    It is gathered for each of them: a rank with fewer labels would leave the others waiting.
    """
    count = max(1, -(-x.shape[0] // rows))
    if not any(is_partitioned(p) or is_sharded(p) for p in head.parameters()):
        return count
    most = torch.tensor(count, device=x.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def causal_model(model: Any) -> Any:
    """Return the language model within DDP's or another engine's wrapper, and within PEFT's."""
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def tail_of(config: Any) -> Tail:
    """Return what a model of this configuration does to its logits, by the names in use."""
    text = config.get_text_config()
    scale = next(
        (float(value) for name in _SCALES if (value := getattr(text, name, None)) is not None), 1.0
    )
    divisor = getattr(text, "logits_scaling", None)  # Granite's; HyperCLOVA X multiplies by it
    if divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return Tail(scale, next((cap for name in _CAPS if (cap := getattr(text, name, None))), None))


_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# of Gemma, RecurrentGemma and xLSTM
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def check_chunks(model: Any, args: Any, smoother: Any, custom: Any) -> None:
    """Raise ValueError, unless the loss is one that is made here."""
    base = causal_model(model)
    if smoother is not None:
        raise ValueError(
            f"label_smoothing_factor: got {args.label_smoothing_factor} with chunked_loss, which "
            f"knows labels alone; set it to 0, or {KEEP}"
        )
    if custom is not None:
        raise ValueError(
            f"compute_loss_func: got one with chunked_loss, and it reads whole logits; {KEEP}"
        )
    what = type(base).__name__
    plain = getattr(base, "loss_function", None) is ForCausalLMLoss
    if not plain or base.config.is_encoder_decoder or base.get_output_embeddings() is None:
        raise ValueError(
            f"chunked_loss: got a {what}, allowed is a causal language model with the loss of "
            f"transformers; {KEEP}"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"chunked_loss: got a prompt before the inputs, which moves labels; {KEEP}"
        )


class ChunkedLossMixin:
    """Computes a Trainer's loss in chunks, where `chunked_loss` is set."""

    chunked_loss = False
    _compared = False

    def _chunk_loss(self: Any, wanted: bool) -> None:
        """Compute the loss in chunks from now on, if wanted; raise where that can't be."""
        if wanted:
            check_chunks(self.model, self.args, self.label_smoother, self.compute_loss_func)
        self.chunked_loss = wanted

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss; with `return_outputs`, outputs whose logits are whole."""
        if not self.chunked_loss or return_outputs or "labels" not in inputs:
            parent: Any = super()
            return parent.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self._chunked(model, inputs, num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Evaluate; where nobody reads the logits, they are not made."""
        parent: Any = super()
        if not (self.chunked_loss and prediction_loss_only and "labels" in inputs):
            return parent.prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        with torch.no_grad():
            trainer: Any = self
            loss = self._chunked(model, trainer._prepare_inputs(inputs), None)
        return loss.detach(), None, None

    def _chunked(self: Any, model: nn.Module, inputs: dict[str, Any], count: Any) -> Tensor:
        loss, _ = chunked_nll(model, inputs, count, compare=not self._compared)
        self._compared = True
        if self.args.average_tokens_across_devices and count is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # of all ranks
        return loss


@contextmanager
def head_input(
    head: nn.Module, positions: int, halves: list[torch.dtype] | None = None
) -> Iterator[list[Tensor]]:
    """Take what the head is handed, and pass on so many positions of it.

    `halves` gets what autocast would have computed its product in, if that is on.
    """
    read: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        read.append(args[0])
        kind = args[0].device.type
        if halves is not None and torch.is_autocast_enabled(kind):
            halves.append(torch.get_autocast_dtype(kind))
        return args[0][:, :positions], *args[1:]

    handle = head.register_forward_pre_hook(take)
    try:
        yield read
    finally:
        handle.remove()


def autocast_as(x: Tensor, halves: list[torch.dtype]) -> AbstractContextManager[Any]:
    """Return the autocast that a Trainer puts around the model's forward, where the loss is not."""
    return torch.autocast(x.device.type, dtype=halves[0]) if halves else nullcontext()


def _chunk_nll(head: nn.Module, x: Tensor, targets: Tensor, tail: Tail) -> Tensor:
    """Return the loss of a chunk; its logits are gone before those of the next are made."""
    return whole_cross_entropy(head(x.unsqueeze(0))[0], targets, tail)


def compare_logits(head: nn.Module, x: Tensor, logits: Tensor, tail: Tail, model: str) -> None:
    """Raise unless the model makes the same logits of what its head was handed."""
    with torch.no_grad():
        made = apply_tail(head(x), tail).float()
    logits = logits.detach().float()
    cast = torch.is_autocast_enabled(x.device.type)
    bound = 5e-2 if cast or x.dtype not in (torch.float32, torch.float64) else 1e-3
    off = float((made - logits).abs().max())
    if not off <= bound * max(1.0, float(logits.abs().max())):
        raise UnknownLogits(
            f"chunked_loss: got logits of {model} that are {off:.3g} from {tail} of its head's, "
            f"allowed is a scale and a softcap that its configuration names; {KEEP}"
        )


def _plain(head: nn.Module) -> bool:
    """Tell whether a head is W x + b with a weight that is whole here."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks)
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not any(hooks)
        # a fake one stands in for a plain one when a run is planned
        and type(head.weight) in (nn.Parameter, FakeTensor)
        and head.weight.numel() > 0
    )
