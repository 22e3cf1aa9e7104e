"""SoRA: sparse low-rank adaptation (Ding et al., arXiv 2311.11696).

W + s B diag(g) A with a gate g for each rank. Each update is followed by the proximal operator of
lambda * norm1(g), which closes gates for good where the loss does not hold them open: the rank of
every layer is found, not given. Unlike the authors' code, the operator is the exact one, the
threshold follows the learning rate, later stages of the schedule train with a learning rate of
their own, and what is pruned leaves: on request while training, and in the stock LoRA of an export.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftConfig, PeftType
from torch import Tensor, nn
from torch.optim import Optimizer

from sft.adapters.base import SparseTuner
from sft.adapters.config import is_whole, require
from sft.adapters.dynamics import Dynamics, Penalty
from sft.adapters.gates.layer import GatedLinear
from sft.adapters.gates.ranks import RankDynamics
from sft.adapters.gates.stages import stage_ends, strengths_between
from sft.adapters.gathered import for_loss
from sft.adapters.layer import SparseLayer
from sft.adapters.registry import register_all
from sft.adapters.select import seeded

RULES = ("soft", "reference")
THRESHOLDS = ("lr", "absolute")


@dataclass
class SoRAConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of SoRA.

    Args:
        target_modules: "all-linear", a list of name suffixes, or a regular expression. By default
            every linear layer but the output head.
        exclude_modules: names or a regular expression to leave out.
        modules_to_save: modules trained and saved densely, such as a new classification head.
        r: ranks of each layer at the start.
        alpha: the product is scaled by alpha / r, also after ranks are gone.
        dropout: probability with which an input does not reach A while training.
        strength: lambda of the proximal step; a list trains one stage with each.
        num_stages: stages whose strengths go from `strength` to `last_strength`. Each begins with
            a fresh optimizer and learning rate schedule.
        last_strength: strength of the last stage.
        strength_path: "linear", "geometric" or "log_linear" from the first to the last.
        first_stage_share: share of the run that the first stage takes; by default all are equal.
        l1: weight of mean ``|gate|`` in the training loss, the authors' sparse_lambda.
        prox: "soft", the exact operator, or "reference", that of the authors' code.
        threshold: "lr", learning rate * strength, or "absolute", the strength itself.
        gate_init: "normal" for N(0, 1), or the number that every gate starts at.
        gate_learning_rate: learning rate of the gates; by default that of the run.
        compact_after: drop ranks for good when their gate stays 0 for so many updates.
        seed: seeds A and the gates, together with the module's name.
        init_weights: start with B = 0 (False: random, for tests).
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    strength: float | list[float] = 0.1
    num_stages: int = 1
    last_strength: float | None = None
    strength_path: str = "linear"
    first_stage_share: float | None = None
    l1: float = 0.0
    prox: str = "soft"
    threshold: str = "lr"
    gate_init: str | float = "normal"
    gate_learning_rate: float | None = None
    compact_after: int | None = None
    seed: int = 0
    init_weights: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        register_all()
        super().__post_init__()
        self.peft_type = PeftType("SORA")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        require("r", self.r, is_whole(self.r) and self.r >= 1, "a whole number of at least 1")
        require("alpha", self.alpha, _number(self.alpha) and self.alpha > 0, "a number above 0")
        below_one = _number(self.dropout) and 0 <= self.dropout < 1
        require("dropout", self.dropout, below_one, "a number in [0, 1)")
        require("l1", self.l1, _number(self.l1) and self.l1 >= 0, "a number of at least 0")
        require("prox", self.prox, self.prox in RULES, " or ".join(RULES))
        require("threshold", self.threshold, self.threshold in THRESHOLDS, " or ".join(THRESHOLDS))
        start = self.gate_init
        fits = start == "normal" or (_number(start) and start != 0)
        require("gate_init", start, fits, "'normal' or a number other than 0")
        rate, patience = self.gate_learning_rate, self.compact_after
        fits = rate is None or (_number(rate) and rate > 0)
        require("gate_learning_rate", rate, fits, "a number above 0, or null")
        fits = patience is None or (is_whole(patience) and patience >= 1)
        require("compact_after", patience, fits, "a whole number of at least 1, or null")
        self._check_stages()

    def _check_stages(self) -> None:
        count, last = self.num_stages, self.last_strength
        require("num_stages", count, is_whole(count) and count >= 1, "a whole number from 1")
        listed = isinstance(self.strength, list)
        given = [*self.strength] if isinstance(self.strength, list) else [self.strength]
        given += [] if last is None else [last]
        fits = bool(given) and all(_number(value) and value >= 0 for value in given)
        require("strength", self.strength, fits, "a number of at least 0, or a list of such")
        require("num_stages", count, not listed or count == 1, "1 where strength is a list")
        require("last_strength", last, not listed or last is None, "null where strength is a list")
        paired = listed or (count > 1) == (last is not None)
        require("last_strength", last, paired, "given together with num_stages above 1")
        share = self.first_stage_share
        fits = share is None or (_number(share) and 0 < share < 1)
        require("first_stage_share", share, fits, "a number between 0 and 1, or null")
        single = len(self.strengths()) == 1
        require("first_stage_share", share, share is None or not single, "null for one stage")
        path = self.strength_path
        unread = path != "linear" and (listed or single)
        require("strength_path", path, not unread, "'linear' unless num_stages is above 1")

    def strengths(self) -> list[float]:
        """Return the strength of each stage."""
        if isinstance(self.strength, list):
            return [float(value) for value in self.strength]
        last = self.strength if self.last_strength is None else self.last_strength
        return strengths_between(self.strength_path, self.strength, last, self.num_stages)

    @property
    def backward_only(self) -> dict[str, str]:
        """Settings that need gradients, and what to set instead: a noisy step opens any gate."""
        return {"strength": "0"} if any(self.strengths()) else {}

    @property
    def optimizer(self) -> str:
        """What the training arguments name: a gate needs no optimizer of its own."""
        return "trainer"


class SoRAModel(SparseTuner):
    """PEFT tuner of SoRA."""

    prefix = "sora_"
    tuner_layer_cls = GatedLinear
    _steered: Mapping[str, Penalty] = MappingProxyType({})  # of runs that have begun, by adapter

    def new_layer(self, config: SoRAConfig, target: nn.Module, name: str) -> SparseLayer:
        """Return a gated layer around a linear one."""
        return GatedLinear(target)

    def attach(
        self, adapter: str, config: SoRAConfig, targets: dict[str, Any], *, on_meta: bool
    ) -> None:
        """Give each target r ranks."""
        for name, layer in targets.items():
            layer.add_adapter(
                adapter,
                *_start(layer, name, config, on_meta=on_meta),
                scale=config.alpha / config.r,
                dropout=config.dropout,
                inference_mode=config.inference_mode,
            )

    def dynamics(self, adapter_name: str, total_steps: int) -> Dynamics | None:
        """Return what sets the strength, and lets dead ranks leave."""
        config: SoRAConfig = self.peft_config[adapter_name]
        penalty = self._penalty(adapter_name)
        self._steered = {**self._steered, adapter_name: penalty}
        return RankDynamics(
            self.adapted_layers(adapter_name),
            adapter_name,
            penalty=penalty,
            strengths=config.strengths(),
            ends=self.stage_ends(adapter_name, total_steps),
            compact_after=config.compact_after,
        )

    def stage_ends(self, adapter_name: str, total_steps: int) -> tuple[int, ...]:
        """Return the updates after which a stage of the schedule ends."""
        config: SoRAConfig = self.peft_config[adapter_name]
        return stage_ends(total_steps, len(config.strengths()), config.first_stage_share)

    def parameter_groups(self, adapter_name: str, learning_rate: float) -> list[dict[str, Any]]:
        """Return the gates: no weight decay, perhaps a learning rate of their own."""
        rate = self.peft_config[adapter_name].gate_learning_rate
        group = {"params": self._gates(adapter_name), "weight_decay": 0.0}
        return [{**group, "lr": learning_rate if rate is None else rate}]

    def penalties(self, adapter_name: str) -> list[Penalty]:
        """Return the penalty of all gates: the one that `dynamics` steers, if there is one."""
        penalty = self._penalty(adapter_name)
        steered = self._steered.get(adapter_name, penalty)
        same = [id(p) for p in steered.parameters] == [id(p) for p in penalty.parameters]
        return [steered if same else penalty]

    def loss_terms(self, adapter_name: str) -> Tensor | None:
        """Return l1 * mean |gate|, over the gates that the adapter began with."""
        config: SoRAConfig = self.peft_config[adapter_name]
        if not config.l1:
            return None
        gates = self._gates(adapter_name)
        whole = torch.cat([for_loss(gate) for gate in gates])
        return config.l1 * whole.abs().sum() / (config.r * len(gates))

    def check_run(self, adapter_name: str, optimizer: Optimizer, *, adds_loss_terms: bool) -> None:
        """Raise if nobody adds the L1 term, or the gates learn at another rate than theirs."""
        config: SoRAConfig = self.peft_config[adapter_name]
        if config.l1 and not adds_loss_terms:
            raise ValueError(
                f"l1: got {config.l1} with a trainer that adds no term to the loss; train with "
                "SparseTrainer or SparseTrainingMixin, or set l1=0"
            )
        wanted, gates = config.gate_learning_rate, {id(p) for p in self._gates(adapter_name)}
        for group in optimizer.param_groups:
            found = float(group.get("initial_lr", group["lr"]))
            if wanted not in (None, found) and any(id(p) in gates for p in group["params"]):
                raise ValueError(
                    f"gate_learning_rate: got {wanted} with an optimizer that moves gates at "
                    f"{found}; train with SparseTrainer and let it make the optimizer, or give it "
                    "the groups of model.base_model.parameter_groups"
                )

    def _penalty(self, adapter: str) -> Penalty:
        config: SoRAConfig = self.peft_config[adapter]
        return Penalty(
            self._gates(adapter),
            config.strengths()[0],
            rule=config.prox,
            times_lr=config.threshold == "lr",
        )

    def _gates(self, adapter: str) -> list[nn.Parameter]:
        return [layer.sora_gate[adapter] for layer in self.adapted_layers(adapter).values()]


def _start(
    layer: GatedLinear, name: str, config: SoRAConfig, *, on_meta: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and the gate that training begins with: LoRA's, and the paper's gate."""
    dtype, r = layer.trained_dtype(), config.r
    if on_meta:
        shapes = (r, layer.in_features), (layer.out_features, r), (r,)
        a, b, gate = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        return a, b, gate
    generator = seeded(config.seed, "sora", name)
    a = torch.empty(r, layer.in_features, dtype=dtype)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    b = torch.zeros(layer.out_features, r, dtype=dtype)
    if not config.init_weights:  # not seeded: two adapters of one configuration shall differ
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    if config.gate_init == "normal":
        return a, b, torch.randn(r, dtype=dtype, generator=generator)
    return a, b, torch.full((r,), float(config.gate_init), dtype=dtype)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


Config: type[PeftConfig] = SoRAConfig
Model = SoRAModel
