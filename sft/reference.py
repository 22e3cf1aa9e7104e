"""The reference of preference and policy training: the same model, its adapter off or as it was.

TRL adds an adapter "ref" where a model comes with one, for it may have been trained before, and
copies parameters by names like LoRA's, which ours are not.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from sft.adapters.base import SparseTuner
from sft.identity import sparse_tuner

COPY = "ref"  # TRL's name


class ReferenceMixin:
    """Lets a reference that TRL has just made be what it means to be.

    A new adapter adds nothing, so that the base is its reference: the copy goes. One that was
    trained before is copied, values and positions.
    """

    _adapters_given: frozenset[str] | None = None  # before TRL adds its copy; None: settled
    model: Any

    def _expect_reference(self, model: Any) -> None:
        """Note what adapters a model comes with, before the trainer is built."""
        self._adapters_given = frozenset(getattr(model, "peft_config", ()))

    def _settle_reference(self) -> None:
        given, self._adapters_given = self._adapters_given, None
        if given and COPY not in given:
            settle_reference(self.model)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return the reference's log-probabilities; TRL may ask while the trainer is built."""
        self._settle_reference()
        return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]


def settle_reference(model: nn.Module) -> None:
    """Let the adapter "ref" be what "default" is, or nothing where that adds nothing.

    Args:
        model: a PeftModel; without a sparse adapter, or both of these names, it is left alone.
    """
    tuner = sparse_tuner(model)
    if tuner is None or not {"default", COPY} <= set(tuner.peft_config):
        return
    if adds_nothing(tuner, "default"):
        model.delete_adapter(COPY)  # type: ignore[operator]
    else:
        state = get_peft_model_state_dict(model, adapter_name="default")
        set_peft_model_state_dict(model, state, adapter_name=COPY)


@torch.no_grad()
def adds_nothing(tuner: SparseTuner, adapter: str) -> bool:
    """Tell whether a model with the adapter is its base, as with one that was not trained yet."""
    if tuner.peft_config[adapter].modules_to_save:
        return False  # what they were is in the copy alone
    layers = tuner.adapted_layers(adapter).values()
    return all(not bool(layer.get_delta_weight(adapter).any()) for layer in layers)
