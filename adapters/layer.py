"""What the layers of all methods share: a frozen layer, and trained values by adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from sft.adapters.gathered import gathered, is_away, read_whole
from sft.adapters.geometry import features, layer_kind, stored_weight, weight_shape
from sft.adapters.merging import MergeStack, announce, check_mergeable, own_index
from sft.adapters.region import Region, Whole
from sft.adapters.residency import Due, Residence, Residency, obstacle
from sft.adapters.state import look_again, watch_state
from sft.adapters.support import fingerprint
from sft.kernels.compose import compose
from sft.kernels.pattern import Pattern

BASE = "__base__"  # PEFT's name, in a mixed batch, for a row without an adapter


class SparseLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen layer and, for each adapter, the values that a method trains.

    Bare, the layer runs aside: y = base(x) + aside(x), and the base stays as it was. While
    `sft.resident` is entered, W holds the effective weight of a method that has a `residence`, and
    forward is one plain GEMM.

    A method's layer names its tensors in `adapter_layer_names` (trained; the first one tells which
    adapters the layer carries) and `other_param_names` (not trained), and provides `aside`,
    `get_delta_weight` and, where they differ from the defaults, the verbs below them.

    Args:
        base_layer: nn.Linear, transformers' Conv1D or nn.Embedding, bitsandbytes linears included.
        reference: round deltas as SpIEL's authors do before adding them.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    keep_dtype: tuple[str, ...] = ()  # trained tensors that stay float32 in a half precision model

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
        for part in self.adapter_layer_names:
            setattr(self, part, nn.ParameterDict())
        for part in self.other_param_names:
            setattr(self, part, BufferDict(persistent=True))
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
        self._residency = Residency(self._stored_weight, reference=reference)
        watch_state(self)

    # -- what a method provides ----------------------------------------------------------------

    def aside(self, x: Tensor, name: str) -> Tensor:
        """Return what an adapter adds to base(x): (..., out)."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense delta of an adapter, in the stored shape of W."""
        raise NotImplementedError

    def residence(self, name: str) -> Residence | None:
        """Return what W holds for this adapter in resident mode, or None: W is never written."""
        return None

    def resident_forward(self, x: Tensor, name: str) -> Tensor:
        """Apply the layer while W holds the adapter's residence."""
        raise NotImplementedError

    def beside(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer, its base untouched, with these adapters."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name in names:
            y = y + self.aside(x, name).to(y.dtype)
        return y

    def merge_region(self, name: str) -> Region:
        """Return what merging overwrites: by default what W holds in resident mode."""
        residence = self.residence(name)
        assert residence is not None
        return residence.region

    def merged_values(self, name: str, originals: Tensor) -> Tensor:
        """Return what merging writes over the originals, in their shape and dtype."""
        residence = self.residence(name)
        assert residence is not None
        return compose(originals, residence.values.detach(), reference=self.reference)

    def merges_exactly(self, name: str) -> bool:
        """Tell whether merging writes what W holds while training; else it rounds once more."""
        return not isinstance(self.merge_region(name), Whole)

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return exact float32 A (r, in), B (out, r) with y = base(x) + x A^T B^T, if there are."""
        return None

    def open_ranks(self, name: str) -> int | None:
        """Return how many ranks are in use, or None where that does not change in training."""
        return None

    def support(self, name: str) -> Tensor:
        """Return the indices of what is trained: (k,), empty where a method trains no subset."""
        return torch.empty(0, dtype=torch.int64)

    def pattern(self, name: str) -> Pattern | None:
        """Return where single trained weights lie, or None where whole tensors are trained."""
        return None

    def file_parts(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that an adapter file holds for this layer."""
        return (*self.adapter_layer_names, *self.other_param_names)

    def check_file(self, adapter: str, parts: dict[str, Tensor], where: str) -> None:
        """Raise unless the tensors of an adapter file fit; nothing has been copied yet.

        Args:
            adapter: its name here.
            parts: the tensors of `file_parts`.
            where: names the module in messages.
        """

    # -- adding adapters -----------------------------------------------------------------------

    def install(
        self,
        name: str,
        trained: dict[str, Tensor],
        fixed: dict[str, Tensor],
        *,
        inference_mode: bool = False,
    ) -> None:
        """Give this layer an adapter.

        Args:
            name: the adapter.
            trained: a tensor for each of `adapter_layer_names`.
            fixed: a tensor for each of `other_param_names`.
            inference_mode: leave the adapter frozen.
        """
        self._residency.restore()
        device = self._stored_weight().device
        for part, tensor in fixed.items():
            getattr(self, part)[name] = tensor if tensor.is_meta else tensor.to(device)
        for part, tensor in trained.items():
            placed = tensor if tensor.is_meta else tensor.to(device)
            getattr(self, part)[name] = nn.Parameter(placed)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        look_again(self)

    @property
    def trained_values(self) -> Any:
        """The first trained tensor by adapter: an nn.ParameterDict."""
        return getattr(self, self.adapter_layer_names[0])

    def trained_dtype(self) -> torch.dtype:
        """Return what new adapters are trained in: float32, or float64 over a float64 base."""
        dtype = self._stored_weight().dtype
        return torch.float64 if dtype == torch.float64 else torch.float32

    def cast_to_base(self, name: str) -> None:
        """Give an adapter the dtype of the base weight, if that is a float."""
        dtype = self._stored_weight().dtype
        if not dtype.is_floating_point:
            return
        for part in set(self.adapter_layer_names) - set(self.keep_dtype):
            values = getattr(self, part)[name]
            cast = values.detach().to(dtype)
            getattr(self, part)[name] = nn.Parameter(cast, requires_grad=values.requires_grad)

    def pretrained_weight(self) -> Tensor:
        """Return the dense weight without deltas: (rows, cols), dequantised if it is packed."""
        self._residency.restore()
        with gathered([self._stored_weight()]):
            weight = self.get_base_weight()
            return weight.clone() if is_away(weight) else weight

    def made_for(self, name: str) -> int:
        """Return the fingerprint of the base weight that the adapter belongs to; 0 matches any."""
        return fingerprint(self._plain_weight())

    def _plain_weight(self) -> Tensor:
        """Return W as stored, without any adapter, merged ones included."""
        self._residency.restore()
        return self._merges.beneath(read_whole(self._stored_weight()))

    # -- execution -----------------------------------------------------------------------------

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Apply the layer with its active adapters.

        Args:
            x: (..., in), or integer ids (...) for an embedding.
            *args: passed on to the base layer.
            adapter_names: the adapter of each row of x, in place of the active ones; "__base__"
                for none. PEFT hands them down from `model(..., adapter_names=[...])`.
            **kwargs: passed on to the base layer.

        Returns:
            (..., out).
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(x, adapter_names, *args, **kwargs)
        resident = self.settle()
        if resident is not None:
            return self.resident_forward(x, resident)
        idle = self.disable_adapters or self.merged
        return self.beside(x, [] if idle else self._present(), *args, **kwargs)

    def _mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base once, and to each row its own adapter."""
        if self.merged:
            raise ValueError("adapter_names: adapters are merged; call unmerge_adapter first")
        rows, wanted = x.shape[0], len(adapter_names)
        if wanted == 0 or rows % wanted:
            raise ValueError(
                f"adapter_names: got {wanted} names for {rows} rows, allowed is one name a row"
            )
        self._residency.restore()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        beams = rows // wanted  # beam search repeats each row
        for name in dict.fromkeys(adapter_names):
            if name in self.trained_values:
                own = [i for i in range(rows) if adapter_names[i // beams] == name]
                where = torch.tensor(own, device=x.device)
                added = self.aside(x.index_select(0, where), name)
                y = y.index_add(0, where, added.to(y.dtype))
        return y

    # -- residency -----------------------------------------------------------------------------

    def enter_resident(self) -> str | None:
        """Enter resident mode. Return None, or the reason why this layer runs aside instead."""
        present = self._present()
        if present and all(self.residence(name) is None for name in present):
            return None  # the method never writes W
        reason = self._obstacle()
        if reason is None and self.base_layer is not self.get_base_layer():
            reason = "another adapter layer lies between"
        self._residency.enabled = reason is None
        self.settle()
        if reason is None and len(present) > 1:
            reason = "several adapters are active"
        return reason

    def leave_resident(self) -> None:
        """Leave resident mode: W is the pre-trained weight again, bit for bit."""
        self._residency.enabled = False
        self._residency.restore()

    def settle(self) -> str | None:
        """Bring W to what the current mode asks for; return the adapter it holds, or None."""
        return self._residency.settle(self.due())

    def due(self) -> Due | None:
        """Return what the current mode asks W to hold, or None: what was pre-trained."""
        present, idle = self._present(), self.disable_adapters or self.merged
        if not self._residency.enabled or idle or len(present) != 1:
            return None
        residence = self.residence(present[0])
        return None if residence is None else Due(self._residency, present[0], residence)

    def sync(self, *, now: bool = True) -> None:
        """Write the trained values to W, now or in the next forward: they moved by any means."""
        if self._residency.key is not None:
            self._residency.invalidate()
            if now:
                self.settle()

    @property
    def content(self) -> object:
        """Names what W holds: equal contents, equal weights."""
        return self._residency.key

    def _present(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.trained_values]

    def _obstacle(self) -> str | None:
        return obstacle(self.get_base_layer())

    def _stored_weight(self) -> Tensor:
        return stored_weight(self.get_base_layer())

    # -- PEFT's verbs --------------------------------------------------------------------------

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
        names = [name for name in names if name in self.trained_values]
        if not names:
            return
        self._residency.restore()
        weight = self._stored_weight()
        check_mergeable(weight)
        for name in names:
            region = self.merge_region(name).mapped(own_index)
            originals = region.read(weight)
            merged = self.merged_values(name, originals)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            region.write(weight, merged)
            self._merges.push(region, originals)
            self.merged_adapters.append(name)
        announce(weight)

    def unmerge(self) -> None:
        """Take merged adapters out again: the base weight is as before, bit for bit."""
        if self.merged_adapters:
            self._merges.undo(self._stored_weight())
            announce(self._stored_weight())
        self.merged_adapters.clear()
        self.settle()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell whether an exact LoRA exists."""
        return self.low_rank(adapter_name) is not None

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the base's device. PEFT's own takes the base's dtype, which rounds."""
        device = device or self._stored_weight().device
        for part in self.adapter_layer_names:
            values = getattr(self, part).get(adapter_name)
            if values is not None and not values.is_meta:
                values.data = values.data.to(device)
        for part in self.other_param_names:
            fixed = getattr(self, part)
            if adapter_name in fixed and not fixed[adapter_name].is_meta:
                fixed[adapter_name] = fixed[adapter_name].to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the layer: the base must be pristine while its storage is replaced."""
        self._residency.restore()
        self._merges.apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Show kind, shape and the shape of the trained tensors by adapter."""
        shown = ", ".join(f"{n}={tuple(v.shape)}" for n, v in self.trained_values.items())
        return f"{self.kind.value}, shape={self.shape}, adapters: {shown}"


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Return all layers of the model that carry adapters of ours, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
