"""S2FT: structured sparse fine-tuning (Yang et al., arXiv 2412.06289).

W[:, idx] = W0[:, idx] + P^T: of the matrices that read the coupled units of a model (attention
heads, feed-forward channels), the columns of some units are trained, and nothing else. Forward is
one GEMM on the effective weight; backward saves the T*s inputs that P needs instead of all T*n, as
the paper describes and no code of the authors does. Units stay where they are (layout "index"), so
any of them can be chosen under grouped-query attention, and adapters can be compared, summed and
served side by side; layout "permuted" moves them next to one another while training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peft import PeftConfig, PeftType
from torch import Tensor, nn

from sft.adapters.budget import Budget
from sft.adapters.calibration import Calibration
from sft.adapters.config import OPTIMIZERS, is_whole, require
from sft.adapters.registry import register_all
from sft.adapters.select import ORDERS
from sft.adapters.slices.budget import ALLOCATIONS, Quota, by_ratio, by_weights
from sft.adapters.slices.calibration import UnitCalibration
from sft.adapters.slices.fusion import fuse
from sft.adapters.slices.layer import SliceLinear
from sft.adapters.slices.selection import (
    CALIBRATED,
    SELECTIONS,
    Choice,
    choose_features,
    weight_scores,
)
from sft.adapters.slices.targets import excluded_features, target_groups
from sft.adapters.slices.tuner import Chosen, SliceTuner
from sft.adapters.slices.units import ATTENTION_UNITS, CONSUMERS, LOOSE, ROLES, UnitGroup
from sft.kernels.kept import FORMS

DEFAULT_DENSITY = 0.02
LAYOUTS = ("index", "permuted")
FUSED = "fused"  # the selection of an adapter that was summed from others


@dataclass
class S2FTConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of S2FT: roles, budget, units and their selection.

    Args:
        roles: the matrices to train: consumers "o" and "down" by default; producers "q", "k", "v",
            "gate", "up" on request. "any" takes modules of no known structure that
            `target_modules` names, and trains input features of them.
        target_modules: narrows the roles to these modules: a list of name suffixes or a regular
            expression. By default all of them.
        exclude_modules: names or a regular expression to leave out.
        modules_to_save: modules trained and saved densely, such as a new classification head.
        density: share of the weights of the matrices in `roles` to train, in (0, 1]. The default
            budget is 0.02. Each role gets the same number of weights, rounded down to whole units.
        num_weights: number of weights to train, instead of `density`.
        match_lora_rank: as many weights as LoRA of this rank would train on the same matrices.
        ratio: share of the *units* of each matrix, as S2FT's authors count; a number, or one for
            each role, such as {"o": 0.052, "down": 0.02}, which then are the roles.
        allocation: "uniform" over the layers, or "pooled": units of all layers compete, so layers
            get different numbers of them, as in the authors' code.
        attention_unit: "heads"; "channels", single input features of o; "vo_channels", dimensions
            that v and o share; or "auto": channels where o is trained alone, else heads.
        selection: "random", "weight" (norm of the consumer's column), "activation" (mean ``|h|``),
            "product" (norm times root mean h^2), "gradient"; the last three read batches first.
        selection_order: prefer the "smallest" (the paper's best) or the "largest" scores.
        calibration_batches: how many batches these read; by default 1 % of the training batches.
        layout: "index" leaves the weights as they are; "permuted" moves trained units next to one
            another while training, as the authors do. Files and exports are the same.
        exclude: folders of saved S2FT adapters whose units are left to them.
        optimizer: "trainer" (what TrainingArguments.optim names), "adamw" (per-entry age), "sm3",
            or "auto": the Trainer's.
        saved_inputs: how the inputs that trained weights' gradients need are kept for backward:
            "full", or in fewer bits and rounded without bias as "bfloat16" or "int8". Of consumers
            these are few; producers need all of theirs.
        seed: seeds random selections, together with the group's name.
        init_weights: start the deltas at 0 (False: random, for tests).
    """

    roles: list[str] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    density: float | None = None
    num_weights: int | None = None
    match_lora_rank: int | None = None
    ratio: float | dict[str, float] | None = None
    allocation: str = "uniform"
    attention_unit: str = "auto"
    selection: str = "random"
    selection_order: str = "smallest"
    calibration_batches: int | None = None
    layout: str = "index"
    exclude: list[str] | None = None
    optimizer: str = "auto"
    saved_inputs: str = "full"
    seed: int = 0
    init_weights: bool = field(default=True, repr=False)

    reference = False  # of sparse AdamW's order of operations
    from_file = False

    def __post_init__(self) -> None:
        register_all()
        super().__post_init__()
        self.peft_type = PeftType("S2FT")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for key, allowed in _CHOICES.items():
            value = getattr(self, key)
            require(key, value, value in allowed, ", ".join(allowed))
        batches = self.calibration_batches
        enough = batches is None or (is_whole(batches) and batches >= 1)
        require("calibration_batches", batches, enough, "a whole number of at least 1")
        folders = self.exclude is None or _is_list(self.exclude)
        require("exclude", self.exclude, folders, "a list of folders of saved adapters")
        self._check_roles()
        self._check_budget()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> S2FTConfig:
        """Read a configuration; its adapter file holds the selection, which is not made again."""
        config: S2FTConfig = super().from_pretrained(*args, **kwargs)
        config.from_file = True
        return config

    def _check_roles(self) -> None:
        if self.roles is None:
            self.roles = list(self.ratio if isinstance(self.ratio, dict) else CONSUMERS)
        ok = _is_list(self.roles) and bool(self.roles) and set(self.roles) <= set(ROLES)
        require("roles", self.roles, ok, f"a list of {', '.join(ROLES)}")
        if isinstance(self.ratio, dict):
            same = set(self.ratio) == set(self.roles)
            require("ratio", self.ratio, same, f"one share for each of the roles {self.roles}")
        heads = {"q", "k"} if self.unit == "vo_channels" else {"q", "k", "v"}
        alone = self.unit == "heads" or not heads & set(self.roles)
        allowed = f"'heads' with roles {self.roles}; only o (and v by vo_channels) has channels"
        require("attention_unit", self.attention_unit, alone, allowed)
        movable = self.unit == "heads" and LOOSE not in self.roles
        fits = self.layout == "index" or movable
        require("layout", self.layout, fits, "'index', or whole heads and known structures with it")
        named = LOOSE not in self.roles or self.target_modules is not None
        require("target_modules", None, named, "names of modules, as roles has 'any'")

    def _check_budget(self) -> None:
        given = [k for k in (*_WEIGHT_BUDGETS, "ratio") if getattr(self, k) is not None]
        if not given:
            self.density = DEFAULT_DENSITY
        one = len(given) <= 1
        require(", ".join(given), "all of them", one, "exactly one of them; remove the others")
        if self.ratio is None:
            self.budget()
            return
        for share in self.ratio.values() if isinstance(self.ratio, dict) else [self.ratio]:
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            require("ratio", share, number and 0 < share <= 1, "0 < ratio <= 1")

    def budget(self) -> Budget:
        """Return the number of weights asked for, unless `ratio` counts units."""
        return Budget(
            density=self.density,
            num_weights=self.num_weights,
            match_lora_rank=self.match_lora_rank,
        )

    def quotas(self, groups: Iterable[UnitGroup]) -> list[Quota]:
        """Return how many units of which matrices are trained."""
        slots = [slot for group in groups for slot in group.slots]
        if self.ratio is not None:
            return by_ratio(slots, self.ratio, self.allocation)
        return by_weights(slots, self.budget(), self.allocation)

    @property
    def unit(self) -> str:
        """What `attention_unit` comes to."""
        if self.attention_unit != "auto":
            return self.attention_unit
        assert self.roles is not None
        alone = not {"q", "k", "v"} & set(self.roles) and self.layout == "index"
        return "channels" if alone else "heads"

    @property
    def suited_optimizer(self) -> str:
        """Slices are ordinary contiguous parameters: any optimizer will do."""
        return "trainer"


_WEIGHT_BUDGETS = ("density", "num_weights", "match_lora_rank")
_CHOICES = {
    "allocation": ALLOCATIONS,
    "attention_unit": ("auto", *ATTENTION_UNITS),
    "selection": (*SELECTIONS, FUSED),
    "selection_order": ORDERS,
    "layout": LAYOUTS,
    "optimizer": OPTIMIZERS,
    "saved_inputs": FORMS,
}


class S2FTModel(SliceTuner):
    """PEFT tuner of S2FT."""

    def find(self, config: S2FTConfig, model: nn.Module) -> list[UnitGroup]:
        """Return the groups of units in which a role is trained."""
        groups = target_groups(model, config)
        _check_experts(config, groups)
        return groups

    def choose(self, groups: list[UnitGroup], config: S2FTConfig, *, on_meta: bool) -> Chosen:
        """Return the features of each module; a placeholder where batches or a file decide."""
        plain = config.selection == "random" and not config.exclude
        if (config.from_file or on_meta) and not plain:
            slots = [slot for group in groups for slot in group.slots]
            return choose_features(groups, by_ratio(slots, _LEAST, "uniform"), Choice(0)), True
        require("selection", config.selection, config.selection != FUSED, ", ".join(SELECTIONS))
        choice = Choice(
            config.seed,
            largest=config.selection_order == "largest",
            scores=weight_scores(groups, self.read) if config.selection == "weight" else None,
            excluded=excluded_features(config.exclude or []),
        )
        chosen = choose_features(groups, config.quotas(groups), choice)
        pending = config.selection in CALIBRATED
        if config.layout == "permuted" and not pending:
            self.permuted.check(groups, chosen)
        return chosen, pending

    def calibration(self, adapter_name: str) -> Calibration | None:
        """Return the scores that the selection asks for."""
        config: S2FTConfig = self.peft_config[adapter_name]
        if config.selection not in CALIBRATED:
            return None
        return UnitCalibration(
            self.model,
            self.groups[adapter_name],
            config.selection,
            config.calibration_batches,
            self.read,
            partial(self._settle, adapter_name),
            self.permuted.paused,
        )

    def _settle(self, adapter: str, scores: dict[str, Tensor]) -> None:
        """Choose the adapter's units by scores, in place of the placeholder."""
        config, groups = self.peft_config[adapter], self.groups[adapter]
        choice = Choice(
            config.seed,
            largest=config.selection_order == "largest",
            scores=scores,
            excluded=excluded_features(config.exclude or []),
        )
        chosen = choose_features(groups, config.quotas(groups), choice)
        if config.layout == "permuted":
            self.permuted.check(groups, chosen)
        for name, layer in self.adapted_layers(adapter).items():
            layer.pending.discard(adapter)
            layer.replace_slice(adapter, chosen[name])

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Add the weighted sum of adapters as a new adapter, exact where their units differ.

        Args:
            adapters: names of adapters of this model.
            weights: a factor for each.
            adapter_name: the new one; activate it with `set_adapter`.

        Raises:
            ValueError: a name is unknown or taken, the numbers of both lists differ, or an adapter
                has modules_to_save, which cannot be summed.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        require("adapters", adapters, bool(adapters) and not unknown, ", ".join(self.peft_config))
        require("weights", weights, len(weights) == len(adapters), "one factor for each adapter")
        require("adapter_name", adapter_name, adapter_name not in self.peft_config, "a new name")
        configs = [self.peft_config[name] for name in adapters]
        dense = {name for config in configs for name in config.modules_to_save or ()}
        allowed = "none: modules trained densely have no sum; add adapters without them"
        require("modules_to_save", sorted(dense), not dense, allowed)
        layers = [layer for layer in self.model.modules() if isinstance(layer, SliceLinear)]
        fuse(layers, adapters, weights, adapter_name, saved_inputs=configs[0].saved_inputs)
        carried = self.adapted_layers(adapter_name)
        self.set_groups(adapter_name, [], moved=False)
        self.peft_config[adapter_name] = replace(
            configs[0],
            roles=list(dict.fromkeys(role for config in configs for role in config.roles)),
            target_modules=set(carried),
            exclude_modules=None,
            modules_to_save=None,
            density=None,
            match_lora_rank=None,
            ratio=None,
            num_weights=sum(x.s2ft_values[adapter_name].numel() for x in carried.values()),
            attention_unit="auto",
            selection=FUSED,
            layout="index",
            exclude=None,
        )


_LEAST = 1e-12  # of units: one in each matrix


def _is_list(value: object) -> bool:
    """Tell lists from a string, which would pass for one of its letters."""
    return isinstance(value, (list, tuple))


def _check_experts(config: S2FTConfig, groups: Iterable[UnitGroup]) -> None:
    """Raise for what modules of experts cannot do."""
    name = next((group.name for group in groups if group.kind == "expert_channels"), None)
    if name is None:
        return
    index = f"'index' for the experts of {name!r}, which stay in their own order"
    require("layout", config.layout, config.layout == "index", index)
    blind = ", ".join(each for each in SELECTIONS if each not in CALIBRATED)
    unseen = f"{blind} with the experts of {name!r}, whose channels no hook can read"
    require("selection", config.selection, config.selection not in CALIBRATED, unseen)


Config: type[PeftConfig] = S2FTConfig
Model = S2FTModel
