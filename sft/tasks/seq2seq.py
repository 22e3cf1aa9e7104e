"""`task: seq2seq`: an encoder reads a prompt, and a decoder learns to write its completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from sft.data.load import Examples
from sft.evaluation import seq2seq
from sft.evaluation.spec import EvaluationSpec
from sft.tasks.base import PROBED, TrainerTask, evaluated, mapped
from sft.tasks.task import TaskOptions


class Seq2SeqOptions(TaskOptions):
    """How much of both texts is read."""

    max_source_length: int = Field(default=512, gt=0, description="tokens kept of a prompt")
    max_target_length: int = Field(default=128, gt=0, description="tokens kept of a completion")


class SequenceToSequence(TrainerTask):
    """Translation, summarisation and the like, with models such as T5 and BART."""

    name: ClassVar[str] = "seq2seq"
    summary: ClassVar[str] = "an encoder reads a prompt, a decoder learns to write its completion"
    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    arguments: ClassVar[str] = "transformers:Seq2SeqTrainingArguments"
    trainer: ClassVar[str] = "sft.trainers.seq2seq:SparseSeq2SeqTrainer"
    peft_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    formats: ClassVar[tuple[str, ...]] = ("prompt_completion",)
    metrics: ClassVar[tuple[str, ...]] = seq2seq.NAMES
    measured: ClassVar[tuple[str, ...]] = ("nll",)
    options_class: ClassVar[type[TaskOptions]] = Seq2SeqOptions

    def trainer_inputs(self, examples: Examples, processor: Any, arguments: Any) -> dict[str, Any]:
        """Tokenise both texts; a batch pads them apart."""
        from transformers import DataCollatorForSeq2Seq

        given = {"tokenizer": processor, **self._lengths()}
        evaluates = evaluated(examples, arguments)
        return {
            "train_dataset": mapped(examples.train, seq2seq.encode, **given),
            "eval_dataset": mapped(evaluates, seq2seq.encode, **given),
            "processing_class": processor,
            "data_collator": DataCollatorForSeq2Seq(processor),
        }

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Measure completions: likelihood of the right ones, error rates of the greedy ones."""
        encoded = [seq2seq.encode(row, processor, **self._lengths()) for row in rows]
        references = [row["completion"] for row in rows]
        return seq2seq.measure(model, processor, encoded, references, spec)

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return prompts, and completions for the decoder to read."""
        encoded = [seq2seq.encode(row, processor, **self._lengths()) for row in rows]
        found = []
        for start in range(0, min(PROBED * size, len(encoded)), size):
            batch = seq2seq.collate(encoded[start : start + size], processor.pad_token_id)
            ids = batch.pop("labels")
            batch["decoder_input_ids"] = ids.masked_fill(ids < 0, processor.pad_token_id)
            found.append({k: v.to(model.device) for k, v in batch.items()})
        return found

    def _lengths(self) -> dict[str, int]:
        options = self.options
        return {"source": options.max_source_length, "target": options.max_target_length}
