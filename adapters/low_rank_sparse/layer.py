"""A frozen linear layer beside which a low-rank product and a sparse matrix are trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from sft.adapters.deltas.site import DeltaSite
from sft.adapters.geometry import Kind
from sft.adapters.layer import SparseLayer
from sft.adapters.region import Region, Whole
from sft.adapters.residency import Residence
from sft.adapters.support import (
    as_indices,
    check_base,
    check_indices,
    check_shape,
    check_values,
    fingerprint,
    support_hash,
)
from sft.kernels.compose_weight import compose_weight
from sft.kernels.composed_linear import composed_linear
from sft.kernels.factored_linear import Scale, factored_is_faster, factored_linear
from sft.kernels.kept import form_in
from sft.kernels.pattern import Pattern


class Settings(NamedTuple):
    """What a layer knows of an adapter besides its tensors.

    Args:
        scale: c, unless it is trained.
        kernel: "auto", "compose" or "factored".
        stored: whether the adapter's file holds the positions.
        saved_inputs: in which form backward's inputs are kept; see `sft.kernels.kept`.
    """

    scale: float
    kernel: str
    stored: bool
    saved_inputs: str = "full"


class SLTrainLinear(SparseLayer):
    """A frozen weight W0 and, for each adapter, c B A + S beside it.

    State of an adapter: `sltrain_values` (k,), `sltrain_a` (r, in), `sltrain_b` (out, r) and, if c
    is trained, `sltrain_scale` (1,), all float32; `sltrain_indices` (k,), the sorted positions of
    S; `sltrain_base` (2,) int64, the fingerprint of W0 and a checksum of the positions.

    Resident, W holds w0 + values at the positions of S: forward is one GEMM and the low-rank part.
    """

    adapter_layer_names = ("sltrain_values", "sltrain_a", "sltrain_b", "sltrain_scale")
    other_param_names = ("sltrain_indices", "sltrain_base")
    keep_dtype = ("sltrain_scale",)

    sltrain_values: nn.ParameterDict
    sltrain_a: nn.ParameterDict
    sltrain_b: nn.ParameterDict
    sltrain_scale: nn.ParameterDict
    sltrain_indices: BufferDict
    sltrain_base: BufferDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._sites: dict[str, DeltaSite] = {}
        self._settings: dict[str, Settings] = {}

    def add_adapter(
        self,
        name: str,
        indices: Tensor,
        trained: dict[str, Tensor],
        settings: Settings,
        *,
        inference_mode: bool = False,
    ) -> None:
        """Give this layer an adapter.

        Args:
            name: the adapter.
            indices: (k,) distinct ascending positions of the stored weight.
            trained: "sltrain_values", "sltrain_a", "sltrain_b" and perhaps "sltrain_scale".
            settings: scale and kernel.
            inference_mode: leave the adapter frozen.
        """
        self._residency.restore()
        fixed = {
            "sltrain_indices": as_indices(indices, self.shape, indices.device),
            "sltrain_base": torch.tensor([fingerprint(self._plain_weight()), checksum(indices)]),
        }
        self._sites[name] = DeltaSite(self, self.sltrain_indices, name)
        self._settings[name] = settings
        self.install(name, trained, fixed, inference_mode=inference_mode)

    def site(self, name: str) -> DeltaSite:
        """Return where the sparse part lies, as backward and the gradient taps see it."""
        return self._sites[name]

    def replace_support(self, name: str, indices: Tensor, source: Tensor) -> None:
        """Put an untrained sparse part at other positions.

        Args:
            name: the adapter.
            indices: (k,) the new positions, ascending.
            source: (k,) -1: no slot is kept.
        """
        assert not bool((source >= 0).any())
        self._residency.restore()
        old = self.sltrain_indices[name]
        with torch.no_grad():
            self.sltrain_values[name].zero_()
            self.sltrain_base[name][1] = checksum(indices)
        self.sltrain_indices[name] = as_indices(indices, self.shape, old.device)
        self.settle()

    # -- the verbs of a layer ------------------------------------------------------------------

    def residence(self, name: str) -> Residence | None:
        """Return the support and its values: the low-rank part stays beside W."""
        return Residence(self._sites[name].region, self.sltrain_values[name])

    def resident_forward(self, x: Tensor, name: str) -> Tensor:
        """Apply the layer while W holds the sparse part."""
        base, site = self.get_base_layer(), self._ready(name)
        conv1d = self.kind is Kind.CONV1D
        form = self._form(name)
        return factored_linear(
            x,
            *self._parts(name),
            site,
            weight=base.weight,
            bias=base.bias,
            conv1d=conv1d,
            saved_inputs=form,
        )

    def aside(self, x: Tensor, name: str) -> Tensor:
        """Return x (c B A + S)^T."""
        return self.multiply(x, name, None)

    def multiply(self, x: Tensor, name: str, bias: Tensor | None) -> Tensor:
        """Return x (c B A + S)^T + bias, by the kernel that the adapter asks for."""
        a, b, values, scale = self._parts(name)
        kernel, tokens = self._settings[name].kernel, x.numel() // max(1, x.shape[-1])
        shape, rank = (self.out_features, self.in_features), a.shape[0]
        if kernel == "auto":
            fast = factored_is_faster(shape, tokens, rank, values.numel(), x.device)
            kernel = "factored" if fast else "compose"
        op = factored_linear if kernel == "factored" else composed_linear
        conv1d, site = self.kind is Kind.CONV1D, self._ready(name)
        form = self._form(name)
        return op(x, a, b, values, scale, site, bias=bias, conv1d=conv1d, saved_inputs=form)

    def _form(self, name: str) -> str:
        values, wanted = self.sltrain_values[name], self._settings[name].saved_inputs
        return form_in(wanted, values, training=self.training)

    def merge_region(self, name: str) -> Region:
        """Return all of W: B A reaches every entry."""
        return Whole()

    def merged_values(self, name: str, originals: Tensor) -> Tensor:
        """Return W0 + c B A + S, summed in float32 or wider and rounded once."""
        return (originals + self.get_delta_weight(name)).to(originals.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return c B A + S in the stored shape, float32 or wider."""
        a, b, values, scale = self._parts(adapter)
        pattern, conv1d = self._sites[adapter].pattern, self.kind is Kind.CONV1D
        out = torch.empty(self.shape, dtype=self.trained_dtype(), device=a.device)
        return compose_weight(a, b, values, scale, pattern, conv1d=conv1d, out=out)

    def support(self, name: str) -> Tensor:
        """Return the positions of the sparse part."""
        indices: Tensor = self.sltrain_indices[name]
        return indices

    def pattern(self, name: str) -> Pattern | None:
        """Return the positions of the sparse part with their rows and columns."""
        return self._sites[name].pattern

    def made_for(self, name: str) -> int:
        """Return the fingerprint that the adapter was made with."""
        return int(self.sltrain_base[name][0])

    def file_parts(self, name: str) -> tuple[str, ...]:
        """Return the adapter's tensors, its positions only if the seed does not give them."""
        parts = [part for part in self.adapter_layer_names if name in getattr(self, part)]
        stored = ("sltrain_indices",) if self._settings[name].stored else ()
        return (*parts, *stored, "sltrain_base")

    def check_file(self, adapter: str, parts: dict[str, Tensor], where: str) -> None:
        """Check sizes, positions, the fingerprint and the checksum of the positions."""
        for part in self.adapter_layer_names:
            if part in parts:
                wanted = tuple(getattr(self, part)[adapter].shape)
                check_values(parts[part], wanted, f"{where}.{part}", self.shape)
        made_for = parts["sltrain_base"]
        check_shape(made_for, (2,), f"{where}.sltrain_base", self.shape)
        check_base(made_for[:1], self._plain_weight(), where, "sltrain_base")
        indices = parts.get("sltrain_indices", self.sltrain_indices[adapter])
        if "sltrain_indices" in parts:
            wanted = tuple(self.sltrain_indices[adapter].shape)
            check_shape(indices, wanted, f"{where}.sltrain_indices", self.shape)
            check_indices(indices, self.shape, f"{where}.sltrain_indices")
        if not indices.is_meta and checksum(indices) != int(made_for[1]):
            raise ValueError(
                f"{where}: its support differs from the one that seed and module name give here; "
                "save the adapter with store_indices=True where it was trained"
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, its site and its settings."""
        self._residency.restore()
        self._sites.pop(adapter_name, None)
        self._settings.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _parts(self, name: str) -> tuple[Tensor, Tensor, Tensor, Scale]:
        """Return A, B, the sparse values, and c."""
        scale: Scale = self._settings[name].scale
        if name in self.sltrain_scale:
            scale = torch.tanh(self.sltrain_scale[name][0])
        return self.sltrain_a[name], self.sltrain_b[name], self.sltrain_values[name], scale

    def _ready(self, name: str) -> DeltaSite:
        if name in self.pending and self.training and self._sites[name].tap is None:
            raise RuntimeError(
                f"selection: adapter {name!r} still has a placeholder support; call "
                "sft.calibrate(model, batches) before training, or train with SparseTrainer"
            )
        return self._sites[name]


def checksum(indices: Tensor) -> int:
    """Return a 63-bit checksum of positions; 0 where they are on the meta device."""
    return 0 if indices.is_meta else int(support_hash([("", indices)])[:16], 16) >> 1
