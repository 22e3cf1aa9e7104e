"""TRL's supervised fine-tuning with our training: it tokenises, masks and collates, we train."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Trainer
from trl import SFTTrainer

from sft.chunked_loss import UnknownLogits, causal_model, chunked_nll
from sft.trainer import SparseTrainingMixin


class _LeanSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose loss, on a CPU, is computed where there are labels, in chunks.

    TRL's loss also computes entropy and accuracy, over the vocabulary at every position: on two
    cores that was a quarter of a step of a 135M model. Elsewhere, or for any other loss than plain
    negative log-likelihood, TRL's own loss is used.
    """

    _known: bool | None = None  # what the model does to its logits

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean negative log-likelihood of the labels."""
        if self._known is False:
            return self._by_the_model(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or not self._lean(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        try:
            loss, _ = chunked_nll(model, inputs, num_items_in_batch, compare=self._known is None)
        except UnknownLogits:
            self._known = False
            return self._by_the_model(model, inputs, return_outputs, num_items_in_batch)
        self._known = True
        return loss

    def _by_the_model(self, *args: Any) -> Any:
        """Return the model's own loss: TRL's multiplies with the head by itself as ours does."""
        return Trainer.compute_loss(self, *args)

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
