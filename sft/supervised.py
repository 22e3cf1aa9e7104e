"""TRL's supervised fine-tuning with our training: it tokenises, masks and collates, we train."""

from __future__ import annotations

import inspect
from typing import Any

from trl import SFTTrainer

from sft.chunked_loss import causal_model, chunked_nll
from sft.trainer import SparseTrainingMixin


class _LeanSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose loss, on a CPU, is computed where there are labels, in chunks.

    TRL's loss also computes entropy and accuracy, over the vocabulary at every position: on two
    cores that was a quarter of a step of a 135M model. Elsewhere, or for any other loss than plain
    negative log-likelihood, TRL's own loss is used.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean negative log-likelihood of the labels."""
        if return_outputs or not self._lean(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return chunked_nll(model, inputs, num_items_in_batch)[0]

    def _lean(self, inputs: dict[str, Any]) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        config = getattr(model, "active_peft_config", None)
        return (
            # a prompt that is put before the inputs moves their positions
            not getattr(config, "is_prompt_learning", False)
            and inputs["input_ids"].device.type == "cpu"
            and self.args.world_size == 1
            and self.args.loss_type == "nll"
            and self.label_smoother is None
            and self.compute_loss_func is None
            and not self.aux_loss_enabled
            and "attention_mask" in inputs
            and "logits_to_keep" in inspect.signature(causal_model(model).forward).parameters
        )


class SparseSFTTrainer(SparseTrainingMixin, _LeanSFTTrainer):
    """`trl.SFTTrainer` for models with a sparse adapter; takes the same arguments."""
