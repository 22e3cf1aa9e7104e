"""TRL's direct preference optimisation with our training."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOTrainer

from sft.trainer import SparseTrainingMixin


class SparseDPOTrainer(SparseTrainingMixin, DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` for models with a sparse adapter; takes the same arguments.

    With an adapter the reference is the same model with the adapter off: no second model. A model
    without one, given as such, is copied as it is; TRL would read it from its files again.
    """

    def __init__(
        self, model: Any = None, ref_model: Any = None, args: Any = None, *rest: Any, **more: Any
    ) -> None:
        if ref_model is None and _needs_copy(model, args, more.get("peft_config")):
            ref_model = copy.deepcopy(model).requires_grad_(False)
        super().__init__(model, ref_model, args, *rest, **more)


def _needs_copy(model: Any, args: Any, peft_config: Any) -> bool:
    """Whether the model's own weights train, and nobody else sees to the reference."""
    if not isinstance(model, PreTrainedModel) or isinstance(model, PeftModel):
        return False
    settled = peft_config is not None or args is None or args.precompute_ref_log_probs
    shards = getattr(args, "deepspeed", None) or getattr(args, "fsdp", None)
    return not (settled or shards)
