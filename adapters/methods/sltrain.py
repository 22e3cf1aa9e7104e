"""SLTrain: sparse plus low-rank weights (Han et al., arXiv 2406.02214).

W = c B A + S with A (r, in), B (out, r) and S = scatter(v) at fixed positions. `form="pretrain"`
is the paper's: the sum replaces every dense weight of attention and MLP from the start, with
A ~ U(+-1/sqrt(in)), B = 0, v ~ U(+-1/sqrt(in)), while embeddings, norms and head are trained
densely. `form="finetune"` adds the same sum to a frozen weight, with B = 0 and v = 0, so that
training starts at the base model. Unlike the authors' code, positions are int32 and follow from
the seed, no dense weight is kept from forward to backward, and the result is exported as a stock
model.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sft.adapters.base import SparseTuner
from sft.adapters.budget import allocate
from sft.adapters.calibration import Calibration
from sft.adapters.config import SparseConfig, is_whole, require
from sft.adapters.deltas.calibration import score_calibration
from sft.adapters.layer import SparseLayer, sparse_layers
from sft.adapters.low_rank_sparse.layer import Settings, SLTrainLinear
from sft.adapters.low_rank_sparse.whole import SLTrainWholeLinear
from sft.adapters.select import candidates_of, seeded, strategy

logger = logging.getLogger(__name__)

FORMS = ("finetune", "pretrain")
KERNELS = ("auto", "compose", "factored")
DEFAULT_DENSITY = 0.03


@dataclass
class SLTrainConfig(SparseConfig):
    """Configuration of SLTrain.

    `density` is of each matrix, int(density * rows * cols) weights, by default 0.03; `num_weights`
    and `match_lora_rank` are shared out over all of them. The rank comes on top.

    Args:
        form: "finetune" beside a frozen weight, "pretrain" instead of any (see
            `sft.pretrain_model`).
        r: rank of B A.
        alpha: c = alpha / r.
        trainable_scale: train c = tanh(s) from s = 1 instead, as the paper's option does.
        kernel: "compose" the dense weight where it is needed, multiply by its parts ("factored"),
            or "auto": whichever costs less by a rule of shapes. A resident weight needs neither.
        store_indices: whether a file holds the positions; "auto" leaves out random ones, which
            follow from seed and module names.
        per_layer_updates: step every parameter in backward and free its gradient at once; clips
            each tensor by itself, and needs SparseTrainer, one process and no loss scaling.
    """

    form: str = "finetune"
    r: int = 16
    alpha: float = 16.0
    trainable_scale: bool = False
    kernel: str = "auto"
    store_indices: str | bool = "auto"
    per_layer_updates: bool = False

    def __post_init__(self) -> None:
        if (self.density, self.num_weights, self.match_lora_rank) == (None, None, None):
            self.density = DEFAULT_DENSITY
        super().__post_init__()
        self.peft_type = PeftType("SLTRAIN")
        require("form", self.form, self.form in FORMS, " or ".join(FORMS))
        require("r", self.r, is_whole(self.r) and self.r >= 1, "a whole number of at least 1")
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        fits = number and math.isfinite(self.alpha) and self.alpha != 0
        require("alpha", self.alpha, fits, "a number other than 0")
        for key in ("trainable_scale", "per_layer_updates"):
            value = getattr(self, key)
            require(key, value, isinstance(value, bool), "true or false")
        none = not self.reference
        require("reference", self.reference, none, "false: there is no other way of SLTrain here")
        require("kernel", self.kernel, self.kernel in KERNELS, ", ".join(KERNELS))
        store = self.store_indices
        fits = store == "auto" or store is True or (store is False and self.selection == "random")
        require("store_indices", store, fits, "auto, true, or with selection='random' false")
        if self.form == "pretrain":
            scored = self.selection != "random"
            require("selection", self.selection, not scored, "random with form='pretrain'")
            dense = self.modules_to_save
            require("modules_to_save", dense, not dense, "none: form='pretrain' trains them all")

    @property
    def stores_indices(self) -> bool:
        """Whether the adapter's file holds the positions."""
        return (
            self.selection != "random"
            if self.store_indices == "auto"
            else self.store_indices is True
        )

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights."""
        return self.form == "pretrain"

    @property
    def backward_only(self) -> dict[str, str]:
        """Settings that need gradients, and what to set instead."""
        return {"per_layer_updates": "false"} if self.per_layer_updates else {}

    @property
    def suited_optimizer(self) -> str:
        """The Trainer's own: all values are of one age."""
        return "trainer"


class SLTrainModel(SparseTuner):
    """PEFT tuner of SLTrain."""

    prefix = "sltrain_"
    tuner_layer_cls = SLTrainLinear

    def new_layer(self, config: SLTrainConfig, target: nn.Module, name: str) -> SparseLayer:
        """Return the layer of the configured form."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if config.form == "finetune":
            return SLTrainLinear(target)
        if base is not target:
            raise ValueError(f"form: 'pretrain' cannot replace {name!r}, which is adapted already")
        return SLTrainWholeLinear(target)

    def attach(
        self, adapter: str, config: Any, targets: dict[str, SparseLayer], *, on_meta: bool
    ) -> None:
        """Choose the support of each target and initialise its parts."""
        counts = _counts(config, {name: layer.shape for name, layer in targets.items()})
        for name, layer in targets.items():
            assert isinstance(layer, SLTrainLinear)
            _check_form(config, layer, name)
            meta = layer.get_base_layer().weight.is_meta
            # whatever device the model is built on, random numbers are drawn on the CPU
            with torch.device("meta" if meta else "cpu"):
                indices = _support(config, layer, name, adapter, counts[name])
            with torch.device("meta" if meta or on_meta else "cpu"):
                trained = _initial(config, layer, name, counts[name])
            settings = Settings(
                config.alpha / config.r, config.kernel, config.stores_indices, config.saved_inputs
            )
            layer.add_adapter(
                adapter, indices, trained, settings, inference_mode=config.inference_mode
            )
        if config.form == "pretrain":
            for parameter in dense_parameters(self.model).values():
                parameter.requires_grad_(not config.inference_mode)
        self._log_counts(adapter)

    def calibration(self, adapter_name: str) -> Calibration | None:
        """Return the accumulation of gradient scores that the selection asks for."""
        layers, config = self.adapted_layers(adapter_name), self.peft_config[adapter_name]
        return score_calibration(layers, adapter_name, config)

    def parameter_groups(self, adapter_name: str, learning_rate: float) -> list[dict[str, Any]]:
        """Return a group for the trained scales, which weight decay would pull to c = 0."""
        layers = self.adapted_layers(adapter_name).values()
        scales = [
            la.sltrain_scale[adapter_name] for la in layers if adapter_name in la.sltrain_scale
        ]
        return [{"params": scales, "weight_decay": 0.0, "lr": learning_rate}] if scales else []

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """Give the base back, if there is one to give back."""
        layers = sparse_layers(self.model).values()
        if not merge and any(isinstance(x, SLTrainWholeLinear) and not x.merged for x in layers):
            raise ValueError(
                "form: 'pretrain' has no base to unload; call merge_and_unload, which composes one"
            )
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    def _log_counts(self, adapter: str) -> None:
        layers = self.adapted_layers(adapter).values()
        sparse = sum(layer.sltrain_values[adapter].numel() for layer in layers)
        low_rank = sum(
            layer.sltrain_a[adapter].numel() + layer.sltrain_b[adapter].numel() for layer in layers
        )
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        logger.info(
            "sltrain: %s low-rank, %s sparse and %s other trained parameters in %d matrices",
            f"{low_rank:,}", f"{sparse:,}", f"{max(0, trained - sparse - low_rank):,}", len(layers),
        )  # fmt: skip

    # -- files -----------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SLTrainConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Leave out positions that the seed gives; put in what pre-training trains densely."""
        chosen: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if not config.stores_indices:
            chosen = {key: t for key, t in chosen.items() if ".sltrain_indices." not in key}
        if config.form == "pretrain":
            chosen |= {key: state_dict[key] for key in dense_parameters(model) if key in state_dict}
        return chosen

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: SLTrainConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Check what pre-training trained densely too, and put in the positions left out."""
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if config.form == "pretrain":
            _check_dense(dense_parameters(model), mapped)
            mapped |= _as_held(model, mapped)
        for name, layer in sparse_layers(model).items():
            if isinstance(layer, SLTrainLinear) and adapter_name in layer.trained_values:
                # the model has what the file leaves out: PEFT warns of what it does not find
                key = f"{name}.sltrain_indices.{adapter_name}"
                mapped.setdefault(key, layer.support(adapter_name))
        return mapped


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what `form="pretrain"` trains densely: embeddings, norms, head and biases.

    Tied parameters come once, under their first name.
    """
    own = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, SLTrainLinear)
        for parameter in layer.parameters()
        if parameter is not layer.get_base_layer().bias
    }
    return {name: p for name, p in model.named_parameters() if id(p) not in own}


def _counts(config: SLTrainConfig, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Return the number of sparse entries of each matrix."""
    if config.density is None:
        return allocate(config.budget().total(shapes), shapes)
    counts = {name: int(config.density * m * n) for name, (m, n) in shapes.items()}
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise ValueError(f"density: {config.density} leaves no weight for {empty[0]}; raise it")
    return counts


def _check_form(config: SLTrainConfig, layer: SLTrainLinear, name: str) -> None:
    whole = isinstance(layer, SLTrainWholeLinear)
    if whole and (config.form != "pretrain" or len(layer.trained_values)):
        raise ValueError(
            f"form: {name!r} has no weight but that of its 'pretrain' adapter, and takes no other; "
            "merge_and_unload first"
        )
    if not whole and config.form == "pretrain":
        raise ValueError(f"form: 'pretrain' cannot replace {name!r}, which is adapted already")


def _support(
    config: SLTrainConfig, layer: SLTrainLinear, name: str, adapter: str, k: int
) -> Tensor:
    """Choose k positions; meta ones on a meta layer, whose support nothing can depend on."""
    if layer.get_base_layer().weight.is_meta:
        return torch.empty(k, dtype=torch.int32)
    chosen = strategy(config.selection)
    if chosen.CALIBRATED:
        layer.pending.add(adapter)
        chosen = strategy("random")
    return chosen.select(candidates_of(layer, name, config), k)


def _initial(config: SLTrainConfig, layer: SLTrainLinear, name: str, k: int) -> dict[str, Tensor]:
    """Return the trained tensors as they start."""
    dtype, bound = layer.trained_dtype(), 1 / math.sqrt(layer.in_features)

    def uniform(part: str, *shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.is_meta:
            return tensor
        # float32 whatever is trained, so that one seed gives one start
        seed = seeded(config.seed, part, name) if config.init_weights else None
        drawn = torch.empty(shape).uniform_(generator=seed)
        return tensor.copy_(drawn.mul_(2).sub_(1).mul_(bound))

    def zeros(_: str, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    start_b = zeros if config.init_weights else uniform
    start_v = start_b if config.form == "finetune" else uniform
    trained = {
        "sltrain_values": start_v("v", k),
        "sltrain_a": uniform("a", config.r, layer.in_features),
        "sltrain_b": start_b("b", layer.out_features, config.r),
    }
    if config.trainable_scale:
        # of one entry: engines that send or shard parameters take none without a dimension
        trained["sltrain_scale"] = torch.ones(1, dtype=dtype)
    return trained


def _check_dense(wanted: dict[str, nn.Parameter], found: dict[str, Tensor]) -> None:
    """Raise unless a file holds everything that is trained densely, in its shape."""
    for key, parameter in wanted.items():
        if key not in found:
            raise ValueError(
                f"adapter file: {key!r} is missing; it was made for another model, or is damaged"
            )
        if found[key].shape != parameter.shape:
            raise ValueError(
                f"adapter file: {key} holds {tuple(found[key].shape)} entries, this model has "
                f"{tuple(parameter.shape)}; load it into a model of its own configuration"
            )


def _as_held(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the dense tensors of a file as the model holds them: kind, device, and what is tied.

    With low_cpu_mem_usage PEFT puts the file's tensors in place of the model's, each under its own
    name: one object under all names of a tied parameter keeps it tied.
    """
    placed = {
        id(p): nn.Parameter(found[key].to(p.dtype) if p.is_meta else found[key].to(p))
        for key, p in dense_parameters(model).items()
    }
    names = model.named_parameters(remove_duplicate=False)
    return {name: placed[id(p)] for name, p in names if id(p) in placed}


Config: type[PeftConfig] = SLTrainConfig
Model = SLTrainModel
