"""SoRA's layer: a frozen weight plus a low-rank product with a trained gate for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from sft.adapters.gates.resize import resize_
from sft.adapters.gathered import gathered
from sft.adapters.geometry import Kind
from sft.adapters.layer import SparseLayer
from sft.adapters.region import Region, Whole
from sft.adapters.residency import obstacle
from sft.adapters.support import check_base, fingerprint
from sft.kernels.gated_linear import gated_delta, gated_linear

_WHOLE = Whole()


class GatedLinear(SparseLayer):
    """A frozen linear layer plus, for each adapter, s * B diag(gate) A.

    State of an adapter: `sora_A` (r, in), `sora_B` (out, r) and `sora_gate` (r,) float32, all
    trained; `sora_base` (1,) int64, the fingerprint of the base weight it was made for. r may be 0:
    the layer is its base then. W is never written but by `merge`.
    """

    adapter_layer_names = ("sora_A", "sora_B", "sora_gate")
    other_param_names = ("sora_base",)
    keep_dtype = ("sora_gate",)

    sora_A: nn.ParameterDict
    sora_B: nn.ParameterDict
    sora_gate: nn.ParameterDict
    sora_base: BufferDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.training = base_layer.training  # no dropout in a model that is evaluated
        self.scale: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.max_rank: dict[str, int] = {}
        self.register_load_state_dict_pre_hook(_fit_ranks)  # type: ignore[no-untyped-call]

    def add_adapter(
        self,
        name: str,
        a: Tensor,
        b: Tensor,
        gate: Tensor,
        *,
        scale: float,
        dropout: float = 0.0,
        inference_mode: bool = False,
    ) -> None:
        """Give this layer an adapter.

        Args:
            name: the adapter.
            a: (r, in).
            b: (out, r).
            gate: (r,).
            scale: s; stays what it is when ranks leave.
            dropout: probability with which an entry of x does not reach A in training.
            inference_mode: leave the adapter frozen.
        """
        self.scale[name], self.dropout[name], self.max_rank[name] = scale, dropout, len(gate)
        trained = {"sora_A": a, "sora_B": b, "sora_gate": gate}
        made_for = torch.tensor([fingerprint(self._plain_weight())], device=gate.device)
        self.install(name, trained, {"sora_base": made_for}, inference_mode=inference_mode)

    def keep_ranks(self, name: str, kept: Tensor) -> None:
        """Let all ranks but these leave; the parameter objects stay.

        Args:
            name: the adapter.
            kept: int64, ascending.
        """
        for part, dim in RANK_DIM.items():
            parameter = getattr(self, part)[name]
            resize_(parameter, parameter.detach().index_select(dim, kept))

    # -- the verbs of a layer ------------------------------------------------------------------

    def beside(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer; with one adapter over a plain base, base and adapter in one go."""
        base: Any = self.base_layer
        names = [name for name in names if len(self.sora_gate[name])]
        if len(names) != 1 or args or kwargs or obstacle(base) is not None:
            return super().beside(x, names, *args, **kwargs)
        name = names[0]
        return gated_linear(
            x,
            base.weight,
            base.bias,
            self.sora_A[name],
            self.sora_B[name],
            self.sora_gate[name],
            self.scale[name],
            conv1d=self.kind is Kind.CONV1D,
            dropped=self._dropped(x, name),
        )

    def aside(self, x: Tensor, name: str) -> Tensor:
        """Return s * (gate o (x A^T)) B^T."""
        gate = self.sora_gate[name]
        if not len(gate):
            return x.new_zeros(*x.shape[:-1], self.out_features)
        dropped = self._dropped(x, name)
        x = x if dropped is None else dropped
        return gated_delta(x, self.sora_A[name], self.sora_B[name], gate, self.scale[name])

    def open_ranks(self, name: str) -> int | None:
        """Return how many gates are not 0."""
        with gathered([self.sora_gate[name]]):
            return int(self.sora_gate[name].detach().count_nonzero())

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return A (r, in) and s B diag(gate) (out, r) of the ranks whose gate is not 0."""
        gate = self.sora_gate[name].detach()
        kept = gate.nonzero().flatten()
        wide = torch.promote_types(gate.dtype, torch.float32)
        a, b = (
            getattr(self, part)[name].detach().to(wide).index_select(RANK_DIM[part], kept)
            for part in ("sora_A", "sora_B")
        )
        return a, b * (self.scale[name] * gate.to(wide)[kept])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s * B diag(gate) A in the stored shape of W, float32 or wider."""
        factors = self.low_rank(adapter)
        assert factors is not None
        delta = factors[1] @ factors[0]
        return delta.t().contiguous() if self.kind is Kind.CONV1D else delta

    def merge_region(self, name: str) -> Region:
        """Return the whole weight."""
        return _WHOLE

    def merged_values(self, name: str, originals: Tensor) -> Tensor:
        """Return W + delta, summed in float32 or wider and rounded once."""
        return (originals + self.get_delta_weight(name)).to(originals.dtype)

    def check_file(self, adapter: str, parts: dict[str, Tensor], where: str) -> None:
        """Check the shapes; a file may hold fewer ranks than the adapter began with."""
        most, found = self.max_rank[adapter], parts["sora_gate"].numel()
        shapes = {
            "sora_A": (found, self.in_features),
            "sora_B": (self.out_features, found),
            "sora_gate": (found,),
        }
        for part, shape in shapes.items():
            tensor = parts[part]
            if tuple(tensor.shape) != shape or found > most or not tensor.is_floating_point():
                raise ValueError(
                    f"{where}.{part} holds {tensor.dtype} {tuple(tensor.shape)}, allowed are "
                    f"floats of at most {most} ranks for a weight of {self.shape}; the adapter was "
                    "made for another model or another r"
                )
        check_base(parts["sora_base"], self._plain_weight(), where, "sora_base")

    def made_for(self, name: str) -> int:
        """Return the fingerprint that the adapter was made with."""
        return int(self.sora_base[name])

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its settings."""
        for settings in (self.scale, self.dropout, self.max_rank):
            settings.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _dropped(self, x: Tensor, name: str) -> Tensor | None:
        probability = self.dropout[name]
        return F.dropout(x, probability) if self.training and probability else None


RANK_DIM = {"sora_A": 0, "sora_B": 1, "sora_gate": 0}


def _fit_ranks(layer: GatedLinear, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Give each adapter the ranks of the file that is about to be copied into it."""
    for name, gate in layer.sora_gate.items():
        incoming = state.get(f"{prefix}sora_gate.{name}")
        if incoming is None or incoming.shape == gate.shape:
            continue
        for part, dim in RANK_DIM.items():
            parameter = getattr(layer, part)[name]
            shape = list(parameter.shape)
            shape[dim] = len(incoming)
            resize_(parameter, parameter.detach().new_zeros(shape))
