"""The layer of every unstructured method: a frozen weight plus trained deltas at a support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from sft.adapters.geometry import Kind, features, layer_kind, weight_shape
from sft.adapters.merging import MergeStack
from sft.adapters.residency import Residency, obstacle
from sft.adapters.site import DeltaSite
from sft.adapters.support import as_indices, fingerprint
from sft.kernels.compose import compose
from sft.kernels.gather import gather
from sft.kernels.sparse_embedding import delta_embedding, resident_embedding
from sft.kernels.sparse_linear import delta_linear, resident_linear
from sft.kernels.write import write_


class DeltaLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
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

    # what PEFT's mix-in provides; without this a reader of types sees nn.Module.__getattr__
    get_base_layer: Callable[[], Any]
    get_base_weight: Callable[[], Tensor]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    _get_embed_scale: Callable[[], Tensor | None]

    def __init__(self, base_layer: nn.Module, *, reference: bool = False) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.delta_values = nn.ParameterDict()
        self.delta_indices = BufferDict(persistent=True)
        self.delta_base = BufferDict(persistent=True)
        kind = layer_kind(self.get_base_layer())
        assert kind is not None
        self.kind = kind
        self.shape = weight_shape(self.get_base_layer())
        self.in_features, self.out_features = features(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.reference = reference
        self.pending: set[str] = set()
        self.merged_adapters: list[str] = []
        self._merges = MergeStack()
        self._sites: dict[str, DeltaSite] = {}
        self._residency = Residency(self, reference=reference)
        # Whatever reads or replaces the base must meet the pre-trained weight.
        self.register_load_state_dict_pre_hook(_restore_first)  # type: ignore[no-untyped-call]
        self.register_state_dict_pre_hook(_restore_first)  # type: ignore[no-untyped-call]

    def add_adapter(
        self, name: str, indices: Tensor, values: Tensor, *, inference_mode: bool = False
    ) -> None:
        """Give this layer an adapter with these positions and deltas.

        Args:
            name: the adapter.
            indices: (k,) distinct ascending positions of the stored weight.
            values: (k,) deltas.
            inference_mode: leave the deltas frozen.
        """
        self._residency.restore()
        weight = self.get_base_layer().weight
        device = indices.device if indices.is_meta else weight.device
        self.delta_indices[name] = as_indices(indices, self.shape, device)
        self.delta_base[name] = torch.tensor([fingerprint(weight)], device=device)
        self.delta_values[name] = nn.Parameter(values.to(device))
        self._sites[name] = DeltaSite(self, name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def cast_to_base(self, name: str) -> None:
        """Give an adapter's deltas the dtype of the base weight, if that is a float."""
        dtype, values = self.get_base_layer().weight.dtype, self.delta_values[name]
        if dtype.is_floating_point:
            cast = values.detach().to(dtype)
            self.delta_values[name] = nn.Parameter(cast, requires_grad=values.requires_grad)

    def pretrained_weight(self) -> Tensor:
        """Return the dense weight without deltas: (rows, cols), dequantised if it is packed."""
        self._residency.restore()
        return self.get_base_weight()

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
        values = self.delta_values[name]
        with torch.no_grad():
            kept = values.index_select(0, source.clamp(min=0))
            values.copy_(torch.where(source >= 0, kept, kept.new_zeros(())))
        old = self.delta_indices[name]
        self.delta_indices[name] = as_indices(indices, self.shape, old.device)
        self.settle()

    # -- execution ---------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer with its active adapters.

        Args:
            x: (..., in), or integer ids (...) for an embedding.
            *args: passed on to the base layer.
            **kwargs: passed on to the base layer.

        Returns:
            (..., out).
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        resident = self.settle()
        if resident is not None:
            return self._resident_forward(x, resident)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self._present():
            y = y + self._delta_forward(x, name).to(y.dtype)
        return y

    def _resident_forward(self, x: Tensor, name: str) -> Tensor:
        base, values, site = self.get_base_layer(), self.delta_values[name], self._ready(name)
        if self.kind is Kind.EMBEDDING:
            return resident_embedding(x, base.weight, values, site, base.padding_idx)
        conv1d = self.kind is Kind.CONV1D
        return resident_linear(x, base.weight, base.bias, values, site, conv1d=conv1d)

    def _delta_forward(self, x: Tensor, name: str) -> Tensor:
        values, site = self.delta_values[name], self._ready(name)
        if self.kind is Kind.EMBEDDING:
            y = delta_embedding(x, values, site, self.get_base_layer().padding_idx)
            scale = self._get_embed_scale()
            return y if scale is None else y * scale.to(y.dtype)
        return delta_linear(x, values, site, conv1d=self.kind is Kind.CONV1D)

    def _ready(self, name: str) -> DeltaSite:
        if name in self.pending and self.training and self._sites[name].tap is None:
            raise RuntimeError(
                f"selection: adapter {name!r} still has a placeholder support; call "
                "sft.calibrate(model, batches) before training, or train with SparseTrainer"
            )
        return self._sites[name]

    # -- residency ---------------------------------------------------------------------------

    def enter_resident(self) -> str | None:
        """Enter resident mode. Return None, or the reason why this layer runs aside instead."""
        reason = obstacle(self.get_base_layer())
        if reason is None and self.base_layer is not self.get_base_layer():
            reason = "another adapter layer lies between"
        self._residency.enabled = reason is None
        self.settle()
        if reason is None and len(self._present()) > 1:
            reason = "several adapters are active"
        return reason

    def leave_resident(self) -> None:
        """Leave resident mode: W is the pre-trained weight again, bit for bit."""
        self._residency.enabled = False
        self._residency.restore()

    def settle(self) -> str | None:
        """Bring W to what the current mode asks for; return the adapter it holds, or None."""
        present = self._present()
        if not self._residency.enabled or self.disable_adapters or self.merged or len(present) != 1:
            self._residency.restore()
            return None
        name = present[0]
        self._residency.write(name, self.delta_indices[name], self.delta_values[name])
        return name

    def sync(self) -> None:
        """Write the trained values to W now, after an optimizer step by whatever means."""
        if self._residency.key is not None:
            self._residency.invalidate()
            self.settle()

    @property
    def content(self) -> object:
        """Names what W holds: equal contents, equal weights."""
        return self._residency.key

    def _present(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.delta_values]

    # -- PEFT's verbs ------------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; off, W is the pre-trained weight bit for bit."""
        super().enable_adapters(enabled)
        self.settle()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; W is left as pre-trained or with the adapter that becomes active."""
        self._residency.restore()
        self._sites.pop(adapter_name, None)
        self.pending.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight, keeping the originals for an exact `unmerge`.

        Args:
            safe_merge: refuse to write values that are not finite.
            adapter_names: which; the active ones by default.

        Raises:
            ValueError: the base cannot be written, or `safe_merge` met a NaN or infinity.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.delta_values]
        if not names:
            return
        self._residency.restore()
        base = self.get_base_layer()
        if not base.weight.is_contiguous():
            raise ValueError(
                f"merge: the base weight of shape {tuple(base.weight.shape)} is not contiguous; "
                "make it so with weight.data = weight.data.contiguous()"
            )
        if not base.weight.is_floating_point():
            raise ValueError(
                f"merge: the base weight is {base.weight.dtype} (quantised), merging would round "
                "deltas away; load the base in 16 or 32 bit, then merge"
            )
        for name in names:
            indices = self.delta_indices[name]
            originals = gather(base.weight, indices)
            values = self.delta_values[name].detach()
            merged = compose(originals, values, reference=self.reference)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            write_(base.weight, indices, merged)
            self._merges.push(indices, originals)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters out again: the base weight is as before, bit for bit."""
        self._merges.undo(self.get_base_layer().weight)
        self.merged_adapters.clear()
        self.settle()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense delta of an adapter: (rows, cols) in the dtype of its values."""
        indices: Tensor = self.delta_indices[adapter]
        values: Tensor = self.delta_values[adapter]
        dense = values.new_zeros(self.shape[0] * self.shape[1])
        dense.index_copy_(0, indices.long(), values.detach())
        return dense.view(self.shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Unstructured deltas are of full rank: no exact LoRA exists."""
        return False

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the base's device. PEFT's own takes the base's dtype, which rounds."""
        device = device or self.get_base_layer().weight.device
        values = self.delta_values[adapter_name]
        if not values.is_meta:
            values.data = values.data.to(device)
            for part in (self.delta_indices, self.delta_base):
                part[adapter_name] = part[adapter_name].to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the layer: the base must be pristine while its storage is replaced."""
        self._residency.restore()
        self._merges.apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Show kind, shape and the number of deltas by adapter."""
        counts = ", ".join(f"{n}={v.numel():,}" for n, v in self.delta_values.items())
        return f"{self.kind.value}, shape={self.shape}, deltas: {counts}"


class DeltaLinear(DeltaLayer):
    """The layer over a linear one: PEFT finds those of an adapted model by "Linear" in the name."""


def _restore_first(layer: DeltaLayer, *_: Any) -> None:
    layer._residency.restore()
