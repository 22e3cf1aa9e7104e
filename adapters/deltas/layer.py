"""The layer of every unstructured method: a frozen weight plus trained deltas at a support."""

from __future__ import annotations

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from sft.adapters.deltas.site import DeltaSite
from sft.adapters.gathered import gathered
from sft.adapters.geometry import Kind
from sft.adapters.layer import SparseLayer
from sft.adapters.residency import Residence
from sft.adapters.state import look_again
from sft.adapters.support import (
    as_indices,
    check_base,
    check_indices,
    check_shape,
    check_values,
    fingerprint,
)
from sft.kernels.kept import form_in
from sft.kernels.pattern import Pattern
from sft.kernels.sparse_embedding import delta_embedding, resident_embedding
from sft.kernels.sparse_linear import delta_linear, resident_linear


class DeltaLayer(SparseLayer):
    """A frozen layer and, for each adapter, k trained deltas at sorted positions of its weight.

    State of an adapter: `delta_values` (k,) float32, the only trained tensor; `delta_indices` (k,)
    int32 (int64 from 2^31 weights), sorted and unique; `delta_base` (1,) int64, the fingerprint of
    the base weight it was made for.

    Bare, the layer runs aside: y = base(x) + x Delta^T, and the base stays as it was. While
    `sft.resident` is entered W holds w0 + delta and forward is one plain GEMM.

    Args:
        base_layer: nn.Linear, transformers' Conv1D or nn.Embedding, bitsandbytes linears included.
        reference: round deltas as SpIEL's authors do before adding them.
    """

    adapter_layer_names = ("delta_values",)
    other_param_names = ("delta_indices", "delta_base")

    delta_values: nn.ParameterDict
    delta_indices: BufferDict
    delta_base: BufferDict

    def __init__(self, base_layer: nn.Module, *, reference: bool = False) -> None:
        super().__init__(base_layer, reference=reference)
        self._sites: dict[str, DeltaSite] = {}

    def add_adapter(
        self,
        name: str,
        indices: Tensor,
        values: Tensor,
        *,
        saved_inputs: str = "full",
        inference_mode: bool = False,
    ) -> None:
        """Give this layer an adapter with these positions and deltas.

        Args:
            name: the adapter.
            indices: (k,) distinct ascending positions of the stored weight.
            values: (k,) deltas.
            saved_inputs: in which form backward's inputs are kept; see `sft.kernels.kept`.
            inference_mode: leave the deltas frozen.
        """
        self._residency.restore()
        weight = self._stored_weight()
        device = indices.device if indices.is_meta else weight.device
        fixed = {
            "delta_indices": as_indices(indices, self.shape, device),
            "delta_base": torch.tensor([fingerprint(self._plain_weight())], device=device),
        }
        self._sites[name] = DeltaSite(self, self.delta_indices, name, saved_inputs=saved_inputs)
        self.install(name, {"delta_values": values}, fixed, inference_mode=inference_mode)

    def site(self, name: str) -> DeltaSite:
        """Return where the adapter's values lie, as backward and the gradient taps see it."""
        return self._sites[name]

    def replace_support(self, name: str, indices: Tensor, source: Tensor) -> None:
        """Move an adapter to a new support of the same size; the parameter object stays.

        W is the pre-trained weight where a position was dropped, and unchanged where one is grown.

        Args:
            name: the adapter.
            indices: (k,) the new positions, ascending.
            source: (k,) int64, the old slot each new slot keeps, or -1 for one that starts at 0.
        """
        self._residency.restore()
        with gathered([self.delta_values[name]]), torch.no_grad():
            values = self.delta_values[name]
            kept = values.index_select(0, source.clamp(min=0))
            values.copy_(torch.where(source >= 0, kept, kept.new_zeros(())))
        old = self.delta_indices[name]
        self.delta_indices[name] = as_indices(indices, self.shape, old.device)
        look_again(self)
        self.settle()

    # -- the verbs of a layer ----------------------------------------------------------------

    def residence(self, name: str) -> Residence | None:
        """Return the support and its deltas."""
        return Residence(self._sites[name].region, self.delta_values[name])

    def resident_forward(self, x: Tensor, name: str) -> Tensor:
        """Apply the layer while W holds the deltas."""
        base, values, site = self.get_base_layer(), self.delta_values[name], self._ready(name)
        if self.kind is Kind.EMBEDDING:
            return resident_embedding(x, base.weight, values, site, base.padding_idx)
        conv1d = self.kind is Kind.CONV1D
        form = form_in(site.saved_inputs, values, training=self.training)
        return resident_linear(
            x, base.weight, base.bias, values, site, conv1d=conv1d, saved_inputs=form
        )

    def aside(self, x: Tensor, name: str) -> Tensor:
        """Return x Delta^T, or the looked-up rows of Delta."""
        values, site = self.delta_values[name], self._ready(name)
        if self.kind is Kind.EMBEDDING:
            y = delta_embedding(x, values, site, self.get_base_layer().padding_idx)
            scale = self._get_embed_scale()
            return y if scale is None else y * scale.to(y.dtype)
        conv1d = self.kind is Kind.CONV1D
        form = form_in(site.saved_inputs, values, training=self.training)
        return delta_linear(x, values, site, conv1d=conv1d, saved_inputs=form)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense delta of an adapter: (rows, cols) in the dtype of its values."""
        values: Tensor = self.delta_values[adapter]
        dense = values.new_zeros(self.shape[0] * self.shape[1])
        dense.index_copy_(0, self.delta_indices[adapter].long(), values.detach())
        return dense.view(self.shape)

    def support(self, name: str) -> Tensor:
        """Return the trained positions."""
        indices: Tensor = self.delta_indices[name]
        return indices

    def pattern(self, name: str) -> Pattern | None:
        """Return the support with its rows and columns."""
        return self._sites[name].pattern

    def made_for(self, name: str) -> int:
        """Return the fingerprint that the adapter was made with."""
        return int(self.delta_base[name])

    def check_file(self, adapter: str, parts: dict[str, Tensor], where: str) -> None:
        """Check sizes, positions and the fingerprint."""
        wanted = tuple(self.delta_values[adapter].shape)
        check_shape(parts["delta_indices"], wanted, f"{where}.delta_indices", self.shape)
        check_values(parts["delta_values"], wanted, f"{where}.delta_values", self.shape)
        check_base(parts["delta_base"], self._plain_weight(), where, "delta_base")
        check_indices(parts["delta_indices"], self.shape, f"{where}.delta_indices")

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its site."""
        self._residency.restore()
        self._sites.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _ready(self, name: str) -> DeltaSite:
        if name in self.pending and self.training and self._sites[name].tap is None:
            raise RuntimeError(
                f"selection: adapter {name!r} still has a placeholder support; call "
                "sft.calibrate(model, batches) before training, or train with SparseTrainer"
            )
        return self._sites[name]


class DeltaLinear(DeltaLayer):
    """The layer over a linear one: PEFT finds those of an adapted model by "Linear" in the name."""
