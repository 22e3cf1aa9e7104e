"""The layer of structured methods: a frozen linear layer of which some features are trained."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from sft.adapters.gathered import gathered
from sft.adapters.geometry import Kind
from sft.adapters.layer import SparseLayer
from sft.adapters.region import Lines, Region
from sft.adapters.residency import Residence
from sft.adapters.slices.permuted import PermutedUnits
from sft.adapters.slices.site import SliceSite
from sft.adapters.state import look_again
from sft.adapters.support import check_base, check_indices, check_values
from sft.kernels.kept import form_in
from sft.kernels.lines import write_lines_
from sft.kernels.slice_linear import resident_slice_linear, slice_linear


class SliceLinear(SparseLayer):
    """A frozen linear layer and, for each adapter, trained deltas of s input or output features.

    State of an adapter: `s2ft_values` (s, out) for input features, (s, in) for output features,
    float32; `s2ft_indices` (s,) int32, the features, ascending, in the base model's own order;
    `s2ft_base` (1,) int64, the fingerprint of the base weight it was made for.

    Args:
        base_layer: nn.Linear or transformers' Conv1D, bitsandbytes linears included.
        side: "in" or "out".
        name: path of the module in the base model.
        permuted: reorders the model while the adapter is resident; see `PermutedUnits`.
    """

    adapter_layer_names = ("s2ft_values",)
    other_param_names = ("s2ft_indices", "s2ft_base")

    s2ft_values: nn.ParameterDict
    s2ft_indices: BufferDict
    s2ft_base: BufferDict

    def __init__(
        self, base_layer: nn.Module, *, side: str, name: str, permuted: PermutedUnits
    ) -> None:
        super().__init__(base_layer)
        self.side = side
        self.path = name
        self.permuted = permuted
        # of the stored weight: W is (out, in), but (in, out) in a Conv1D
        self.axis = int((side == "in") == (self.kind is Kind.LINEAR))
        self._sites: dict[str, SliceSite] = {}

    def add_adapter(
        self,
        name: str,
        features: Tensor,
        *,
        saved_inputs: str = "full",
        inference_mode: bool = False,
    ) -> None:
        """Give this layer an adapter with zero deltas.

        Args:
            name: the adapter.
            features: (s,) distinct ascending features; on the meta device, so are the deltas.
            saved_inputs: in which form backward's inputs are kept; see `sft.kernels.kept`.
            inference_mode: leave the deltas frozen.
        """
        self.permuted.restore()
        self._sites[name] = SliceSite(self, name, saved_inputs)
        values = torch.zeros(
            len(features), self._line, dtype=self.trained_dtype(), device=features.device
        )
        self.install(
            name,
            {"s2ft_values": values},
            {
                "s2ft_indices": features.to(torch.int32),
                "s2ft_base": torch.tensor([super().made_for(name)], device=features.device),
            },
            inference_mode=inference_mode,
        )

    def site(self, name: str) -> SliceSite:
        """Return where the adapter's features lie now, as backward sees it."""
        return self._sites[name]

    def replace_slice(self, name: str, features: Tensor, values: Tensor | None = None) -> None:
        """Move an adapter to other features; the parameter object stays, its size may change.

        Args:
            name: the adapter.
            features: (s,) ascending.
            values: their deltas, zeros by default.
        """
        self.permuted.restore()
        self._residency.restore()
        if values is None:
            values = torch.zeros(len(features), self._line)
        with gathered([self.s2ft_values[name]]):
            own = self.s2ft_values[name]
            own.data = values.to(own.device, own.dtype)
        old = self.s2ft_indices[name]
        self.s2ft_indices[name] = features.to(old.device, torch.int32)
        look_again(self)
        self.settle()

    @property
    def _line(self) -> int:
        return self.out_features if self.side == "in" else self.in_features

    # -- what the shared layer asks for ----------------------------------------------------------

    def aside(self, x: Tensor, name: str) -> Tensor:
        """Return x[:, idx] P, or x P^T at the outputs idx."""
        site, values = self._ready(name), self.s2ft_values[name]
        form = form_in(site.saved_inputs, values, training=self.training)
        return slice_linear(x, values, site, out_features=self.out_features, saved_inputs=form)

    def lines(self, indices: Tensor) -> Region:
        """Return where features lie in the stored weight."""
        return Lines(self.axis, indices)

    def residence(self, name: str) -> Residence | None:
        """Return the lines of W that the adapter trains, where they lie now."""
        return Residence(self._sites[name].region, self.s2ft_values[name])

    def resident_forward(self, x: Tensor, name: str) -> Tensor:
        """Apply the one GEMM; backward reaches the slice alone."""
        base, values, site = self.get_base_layer(), self.s2ft_values[name], self._ready(name)
        conv1d = self.kind is Kind.CONV1D
        form = form_in(site.saved_inputs, values, training=self.training)
        return resident_slice_linear(
            x, base.weight, base.bias, values, site, conv1d=conv1d, saved_inputs=form
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense delta of an adapter, in the stored shape of W."""
        values = self.s2ft_values[adapter].detach()
        dense: Tensor = values.new_zeros(self.shape)
        write_lines_(dense, self.s2ft_indices[adapter], self.axis, values)
        return dense

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return A (s, in) and B (out, s): the values, and a one-hot row or column for each."""
        values, where = self.s2ft_values[name].detach().float(), self.s2ft_indices[name].long()
        count = self.in_features if self.side == "in" else self.out_features
        one_hot = values.new_zeros(len(where), count)
        one_hot[torch.arange(len(where)), where] = 1
        return (one_hot, values.t()) if self.side == "in" else (values, one_hot.t())

    def live_slice(self, name: str) -> Tensor:
        """Return the slice as it lies in W, (s, line), without a copy.

        Raises:
            ValueError: it is no contiguous block. A strided view is refused: torch's fused AdamW,
                the Trainer's default, takes one for dense and overwrites frozen weights.
        """
        site = self._sites[name]
        weight = self._stored_weight().detach()
        if self.axis != 0 or site.start is None or not weight.is_contiguous():
            raise ValueError(
                f"live_slice: got features on axis {self.axis} of a {self.kind.value} weight, "
                "allowed is a run of contiguous rows, since fused optimizers corrupt the "
                "neighbours of a strided view; train s2ft_values instead"
            )
        return weight[site.start : site.start + len(site.indices)]

    def support(self, name: str) -> Tensor:
        """Return the trained features."""
        indices: Tensor = self.s2ft_indices[name]
        return indices

    def made_for(self, name: str) -> int:
        """Return the fingerprint of the base weight that the adapter belongs to."""
        return int(self.s2ft_base[name])

    def check_file(self, adapter: str, parts: dict[str, Tensor], where: str) -> None:
        """Raise unless the file fits; take over its number of features."""
        indices, values = parts["s2ft_indices"], parts["s2ft_values"]
        features = self.in_features if self.side == "in" else self.out_features
        check_indices(indices, (features, 1), f"{where}.s2ft_indices")
        check_values(values, (len(indices), self._line), f"{where}.s2ft_values", self.shape)
        self.permuted.restore()
        check_base(parts["s2ft_base"], self._plain_weight(), where, "s2ft_base")
        own = self.s2ft_values[adapter]
        if own.shape != values.shape:
            own.data = own.data.new_empty(values.shape)
            held = self.s2ft_indices[adapter]
            self.s2ft_indices[adapter] = held.new_zeros(len(indices), dtype=torch.int32)

    def _ready(self, name: str) -> SliceSite:
        if name in self.pending and self.training:
            raise RuntimeError(
                f"selection: adapter {name!r} still has a placeholder slice; call "
                "sft.calibrate(model, batches) before training, or train with SparseTrainer; a "
                "configuration that was read from a file has to be made anew for a new adapter"
            )
        return self._sites[name]

    def held(self) -> str | None:
        """Return the adapter that W holds in the next forward pass, or None."""
        present = self._present()
        idle = not self._residency.enabled or self.disable_adapters or self.merged
        if idle or len(present) != 1 or present[0] in self.pending:
            return None
        return present[0]

    def _present(self) -> list[str]:
        """Leave out adapters that train nothing here, as a pool over layers may decide."""
        return [name for name in super()._present() if self.s2ft_values[name].numel()]

    # -- the base must be in its own order whenever it is read or changed --------------------------

    def pretrained_weight(self) -> Tensor:
        """Return the dense weight without deltas, in the base model's own order."""
        self.permuted.restore()
        return super().pretrained_weight()

    def leave_resident(self) -> None:
        """Leave resident mode: W is the pre-trained weight again, bit for bit."""
        self.permuted.restore()
        super().leave_resident()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self.permuted.restore()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones."""
        self.permuted.restore()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter."""
        self.permuted.restore()
        self._sites.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight, keeping the originals for an exact `unmerge`."""
        self.permuted.restore()
        super().merge(safe_merge, adapter_names)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.permuted.restore()
        return super()._apply(fn, recurse)
