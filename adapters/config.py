"""What every sparse method's configuration shares: targets, budget, selection."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from sft.adapters.budget import Budget
from sft.adapters.registry import register_all
from sft.adapters.select import ORDERS, strategy
from sft.kernels.kept import FORMS

DEFAULT_DENSITY = 0.005
OPTIMIZERS = ("auto", "adamw", "sm3", "trainer")


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number; True and 2.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def require(key: str, value: object, ok: bool, allowed: str) -> None:
    """Raise a ValueError that names the key, what was found and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"{key}: got {value!r}, allowed is {allowed}")


@dataclass
class SparseConfig(PeftConfig):  # type: ignore[misc]
    """Targets, budget and selection of an adapter that trains single weights.

    Args:
        target_modules: "all-linear", a list of name suffixes, or a regular expression. By default
            every linear layer but the output head.
        exclude_modules: names or a regular expression to leave out.
        modules_to_save: modules trained and saved densely, such as a new classification head.
        density: share of the targeted weights to train, in (0, 1]. The default budget is 0.005.
        num_weights: number of weights to train, instead of `density`.
        match_lora_rank: as many weights as LoRA of this rank would train, instead of `density`.
        selection: where to train at first: "random", "magnitude", "gradient" (accumulated |g|) or
            "fisher" (accumulated g^2); the last two read `calibration_batches` batches.
        selection_order: prefer the "largest" or the "smallest" scores.
        calibration_batches: how many batches a calibrated selection reads.
        optimizer: "adamw" (per-entry age), "sm3", "trainer" (what TrainingArguments.optim names),
            or "auto": what suits the method, unless TrainingArguments.optim was set.
        saved_inputs: how the inputs that trained weights' gradients need are kept for backward:
            "full", or in fewer bits and rounded without bias as "bfloat16" (half of float32) or
            "int8" (a quarter).
        seed: seeds every random choice, together with the module's name.
        reference: do as the method's authors did, where their choices differ from ours.
        init_weights: start the deltas at 0 (False: random, for tests).
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    density: float | None = None
    num_weights: int | None = None
    match_lora_rank: int | None = None
    selection: str = "random"
    selection_order: str = "largest"
    calibration_batches: int = 8
    optimizer: str = "auto"
    saved_inputs: str = "full"
    seed: int = 0
    reference: bool = False
    init_weights: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        register_all()
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if (self.density, self.num_weights, self.match_lora_rank) == (None, None, None):
            self.density = DEFAULT_DENSITY
        self.budget()
        strategy(self.selection)
        order = self.selection_order
        require("selection_order", order, order in ORDERS, " or ".join(ORDERS))
        require("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, ", ".join(OPTIMIZERS))
        require("saved_inputs", self.saved_inputs, self.saved_inputs in FORMS, ", ".join(FORMS))
        batches = self.calibration_batches
        enough = is_whole(batches) and batches >= 1
        require("calibration_batches", batches, enough, "a whole number of at least 1")

    def budget(self) -> Budget:
        """Return the number of weights asked for."""
        return Budget(
            density=self.density,
            num_weights=self.num_weights,
            match_lora_rank=self.match_lora_rank,
        )

    @property
    def suited_optimizer(self) -> str:
        """What optimizer="auto" means: "adamw", unless a method says otherwise."""
        return "adamw"
