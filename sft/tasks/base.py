"""What tasks share: a tokenizer, rows that go to the trainer as they are, no head of their own."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from typing import Any, ClassVar

from sft.data.load import Examples
from sft.errors import UserError
from sft.models import load_model, load_tokenizer
from sft.recipe.schema import ModelSpec
from sft.tasks.task import TaskOptions

PROBED = 2  # batches on which an exported model is compared


class TaskBase:
    """The defaults of a task: a causal language model that TRL's trainer reads rows for."""

    options_class: ClassVar[type[TaskOptions]] = TaskOptions
    arguments: ClassVar[str]  # module:class, imported when a run needs it
    trainer: ClassVar[str]
    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    auto: ClassVar[str] = "AutoModelForCausalLM"
    sequences: ClassVar[int] = 1
    from_random: ClassVar[bool] = False

    def __init__(self, options: TaskOptions) -> None:
        self.options: Any = options
        self.missing: list[str] = []  # parameters of the model that no file had

    def arguments_class(self) -> type:
        """Return the dataclass whose fields are the keys under `training:`."""
        found: type = pkgutil.resolve_name(self.arguments)
        return found

    def trainer_class(self) -> type:
        """Return the trainer, with our mix-in before it."""
        found: type = pkgutil.resolve_name(self.trainer)
        return found

    def kind(self) -> Any:
        """Return the class that loads the model."""
        import transformers

        return getattr(transformers, self.auto)

    def check_data(self, examples: Examples, metrics: Sequence[str], key: str) -> None:
        """Take any examples: their format says it all."""

    def load_processor(self, spec: ModelSpec) -> Any:
        """Load the tokenizer."""
        return load_tokenizer(spec)

    def load_model(self, spec: ModelSpec, examples: Examples, device: str | None) -> Any:
        """Load the causal language model."""
        model = load_model(spec, device=device)
        check_decoder(model.config, spec.name)
        return model

    def heads(self, model: Any) -> list[str]:
        """Return the modules that no file had: a frozen random one would stay random."""
        return sorted({name.rpartition(".")[0] or name for name in self.missing})

    def trainer_inputs(self, examples: Examples, processor: Any, arguments: Any) -> dict[str, Any]:
        """Hand over the rows as they are: TRL tokenises, masks and collates."""
        return {
            "train_dataset": examples.train,
            "eval_dataset": evaluated(examples, arguments),
            "processing_class": processor,
        }


class TrainerTask(TaskBase):
    """The defaults of a task that transformers' own Trainer trains, on a model of any class."""

    arguments: ClassVar[str] = "transformers:TrainingArguments"
    trainer: ClassVar[str] = "sft.trainer:SparseTrainer"

    def load_model(self, spec: ModelSpec, examples: Examples, device: str | None) -> Any:
        """Load the model as the class that `auto` names."""
        return load_model(spec, device=device, kind=self.kind(), missing=self.missing)


class HeadTask(TrainerTask):
    """The defaults of a task that puts a head of its own on a model."""

    def heads(self, model: Any) -> list[str]:
        """Return what lies between the backbone and the output, and what else starts at random."""
        new = (
            name
            for name, child in model.named_children()
            if name != model.base_model_prefix and next(child.parameters(), None) is not None
        )
        return sorted({*super().heads(model), *new})


def check_decoder(config: Any, name: str) -> None:
    """Raise UserError on an encoder: its tokens see those that they should predict."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    both = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_MASKED_LM_MAPPING
    if both and not (config.is_decoder or getattr(config, "causal", False)):
        raise UserError(
            f"model.name: {name} is an encoder ({config.model_type}), whose tokens see those that "
            "follow; take a decoder, or task: masked-lm"
        )


def evaluated(examples: Examples, arguments: Any) -> Any | None:
    """Return the rows that training evaluates on, or None where it does not."""
    return None if arguments.eval_strategy == "no" else examples.held_out


def mapped(rows: Any | None, encode: Any, **given: Any) -> Any | None:
    """Return what `encode` makes of each row, in place of its columns; None stays None."""
    if rows is None:
        return None
    return rows.map(encode, fn_kwargs=given, remove_columns=rows.column_names)
