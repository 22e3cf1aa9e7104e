"""`task: grpo`: a language model learns by rewards for what it writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator

from sft.data.load import Examples
from sft.errors import UserError
from sft.evaluation import rewarded
from sft.evaluation.batches import held_out_batches
from sft.evaluation.spec import EvaluationSpec
from sft.rewards.find import RewardSpec, reward_functions
from sft.tasks.base import PROBED, TaskBase
from sft.tasks.task import TaskOptions


class PolicyOptions(TaskOptions):
    """What a completion is rewarded for."""

    rewards: list[RewardSpec] = Field(
        min_length=1, description="names, `file.py:function`, or sections with name and weight"
    )
    reference: str | None = Field(
        default=None, description="column with the right answer; default: completion or answer"
    )

    @field_validator("rewards", mode="before")
    @classmethod
    def _by_name_alone(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [{"name": item} if isinstance(item, str) else item for item in value]


class Policy(TaskBase):
    """Group relative policy optimisation (Shao et al., arXiv:2402.03300) by TRL's GRPOTrainer."""

    name: ClassVar[str] = "grpo"
    summary: ClassVar[str] = "a language model learns by rewards for what it writes itself"
    arguments: ClassVar[str] = "trl:GRPOConfig"
    trainer: ClassVar[str] = "sft.trainers.policy:SparseGRPOTrainer"
    formats: ClassVar[tuple[str, ...]] = ("prompt", "prompt_completion")
    metrics: ClassVar[tuple[str, ...]] = rewarded.NAMES
    measured: ClassVar[tuple[str, ...]] = ("reward",)
    options_class: ClassVar[type[TaskOptions]] = PolicyOptions

    def trainer_inputs(self, examples: Examples, processor: Any, arguments: Any) -> dict[str, Any]:
        """Hand over prompts, and what rewards the completions."""
        if arguments.reward_weights is not None:
            raise UserError("training.reward_weights: is set by the weights of task.rewards")
        rewards = self._rewards()
        arguments.reward_weights = [weight for _, weight in rewards]
        found = super().trainer_inputs(examples, processor, arguments)
        return found | {"reward_funcs": [function for function, _ in rewards]}

    def measure(
        self, model: Any, processor: Any, rows: Any, format: str, spec: EvaluationSpec, longest: int
    ) -> dict[str, float]:
        """Measure what greedy completions are worth."""
        column = self.options.reference
        return rewarded.measure(model, processor, rows, spec, longest, self._rewards(), column)

    def probe(
        self, model: Any, processor: Any, rows: Any, format: str, size: int, longest: int
    ) -> Sequence[dict[str, Any]]:
        """Return prompts."""
        encoded = rewarded.encode_prompts(rows, processor, longest)
        return held_out_batches(encoded, size, processor.pad_token_id, model.device, PROBED)

    def _rewards(self) -> list[tuple[Any, float]]:
        return reward_functions(self.options.rewards, self.options.reference)
