"""S2FT inside a mixture of experts: trained input channels of single experts' down projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sft.adapters.gathered import gathered
from sft.adapters.region import ExpertLines, Region
from sft.adapters.slices.layer import SliceLinear
from sft.adapters.slices.permuted import PermutedUnits
from sft.adapters.slices.site import SliceSite
from sft.kernels.kept import form_in
from sft.kernels.slice_linear import resident_slice_linear, slice_linear
from sft.kernels.sparse_linear import linear


class SliceExperts(SliceLinear):
    """The experts of one layer, stored as 3-D parameters, and trained deltas of s channels.

    The channels are numbered through the experts: channel j of expert e is e * channels + j. Each
    expert saves the trained channels of its own tokens, (tokens of e) * (channels of e), and
    nothing else for the adapter. It computes what the module's own forward does, expert by expert,
    as an implementation of transformers' experts interface.

    Args:
        base_layer: a module with gate_up_proj (or up_proj) and down_proj.
        name: path of the module in the base model.
        permuted: as for `SliceLinear`; experts stay in their own order.
    """

    def __init__(self, base_layer: nn.Module, *, name: str, permuted: PermutedUnits) -> None:
        super().__init__(base_layer, side="in", name=name, permuted=permuted)
        base = self.get_base_layer()
        self.num_experts: int = base.down_proj.shape[0]
        self.channels = self.in_features // self.num_experts
        self.axis = 1 if base.is_transposed else 2

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        adapter_names: list[str] | None = None,
    ) -> Tensor:
        """Send each token through its experts.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k) the experts of each token.
            top_k_weights: (tokens, k) their weights.
            adapter_names: not possible here: tokens of several rows have lost their row.

        Returns:
            (tokens, hidden).
        """
        if adapter_names is not None and not self.disable_adapters:
            raise ValueError(
                "adapter_names: experts see tokens, not rows; run each adapter's rows by themselves"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        held = self.settle()
        names = self._present()
        idle = held is None and (self.disable_adapters or self.merged or not names)
        if idle or not len(hidden_states):
            y: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return y
        order = top_k_index.flatten().argsort(stable=True)  # pairs of token and expert, by expert
        tokens = torch.div(order, top_k_index.shape[1], rounding_mode="floor")
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
        parts = self._run(torch.split(hidden_states[tokens], counts), held, names)
        weighted = parts * top_k_weights.flatten()[order, None]
        pairs = weighted[order.argsort()].view(*top_k_index.shape, -1)
        return pairs.sum(dim=1).to(hidden_states.dtype)

    def _run(self, inputs: Sequence[Tensor], held: str | None, names: list[str]) -> Tensor:
        """Return the outputs of all experts for their tokens, expert after expert."""
        slices = {name: self._slices(name) for name in names}
        outputs = [
            self._down(expert, self._intermediate(expert, x), held, slices)
            for expert, x in enumerate(inputs)
            if len(x)
        ]
        return torch.cat(outputs)

    def _intermediate(self, expert: int, x: Tensor) -> Tensor:
        """Return (tokens, channels), what an expert's down projection reads."""
        base = self.get_base_layer()
        name = "gate_up_proj" if base.has_gate else "up_proj"
        bias = getattr(base, f"{name}_bias")[expert] if base.has_bias else None
        weight = getattr(base, name)[expert]
        h = linear(x, weight, bias, conv1d=base.is_transposed)
        result: Tensor = base._apply_gate(h) if base.has_gate else base.act_fn(h)
        return result

    def _down(
        self, expert: int, h: Tensor, held: str | None, slices: dict[str, list[_Slice]]
    ) -> Tensor:
        base: Any = self.get_base_layer()
        weight, conv1d = base.down_proj[expert], bool(base.is_transposed)
        bias = base.down_proj_bias[expert] if base.has_bias else None
        if held is not None and len(slices[held][expert].indices):
            own = slices[held][expert]
            y = resident_slice_linear(
                h, weight, bias, own.values, own, conv1d=conv1d, saved_inputs=self._form(held)
            )
        else:
            y = linear(h, weight, bias, conv1d=conv1d)
        for name, each in slices.items():
            own = each[expert]
            if held is None and len(own.indices):
                form, count = self._form(name), self.out_features
                added = slice_linear(h, own.values, own, out_features=count, saved_inputs=form)
                y = y + added.to(y.dtype)
        if base.has_post_expert_norm:
            y = base.post_expert_norm(y)
        return y

    def _form(self, name: str) -> str:
        # asked of all of them: without gradients, parts of a parameter need none
        values = self.s2ft_values[name]
        return form_in(self._sites[name].saved_inputs, values, training=self.training)

    def _slices(self, name: str) -> list[_Slice]:
        """Return what each expert trains."""
        site = self._ready(name)
        region = site.region
        assert isinstance(region, ExpertLines)
        counts = torch.bincount(region.experts, minlength=self.num_experts).tolist()
        # one split: its backward joins the experts' gradients without a zero tensor for each
        values = torch.split(self.s2ft_values[name], counts)
        indices = torch.split(region.indices, counts)
        return [_Slice(site, i, v) for i, v in zip(indices, values, strict=True)]

    def lines(self, indices: Tensor) -> Region:
        """Return where channels, numbered through the experts, lie in down_proj."""
        experts = torch.div(indices.long(), self.channels, rounding_mode="floor")
        return ExpertLines(self.axis, experts, indices.long() % self.channels)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense delta of an adapter, in the shape of down_proj."""
        values = self.s2ft_values[adapter].detach()
        dense: Tensor = values.new_zeros(self._stored_weight().shape)
        self.lines(self.s2ft_indices[adapter]).write(dense, values)
        return dense

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return None: stock LoRA has no factors for single experts of a 3-D parameter."""
        return None

    def pretrained_weight(self) -> Tensor:
        """Return (hidden, experts * channels), the columns numbered through the experts."""
        self._residency.restore()
        with gathered([self._stored_weight()]):
            return expert_columns(self.get_base_layer())

    def _obstacle(self) -> str | None:
        base = self.get_base_layer()
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
            return "it carries hooks"
        if type(base.down_proj) is not nn.Parameter:
            return f"its weight is a {type(base.down_proj).__name__} (sharded)"
        return "its weight is on the meta device" if base.down_proj.is_meta else None


def expert_columns(base: Any) -> Tensor:
    """Return the down projections side by side: (out, experts * in)."""
    weight: Tensor = base.down_proj.detach()
    weight = weight if base.is_transposed else weight.transpose(1, 2)
    columns: Tensor = weight.reshape(-1, weight.shape[-1]).t()
    return columns


@dataclass(frozen=True, eq=False)
class _Slice:
    """What one expert trains, as its GEMM's backward needs to know it."""

    site: SliceSite
    indices: Tensor
    values: Tensor

    side = "in"
    start = None

    @property
    def stamp(self) -> object:
        """Equal stamps mean that the experts and their slices are the same."""
        return self.site.stamp
