"""Every task on disk with every method on disk: from a recipe to a model that loads again."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from sft.adapters.registry import method_names
from sft.tasks.find import task_classes

KINDS = {
    "masked-lm": "distilbert", "classification": "bert", "token-classification": "bert",
    "seq2seq": "t5", "image-classification": "vit",
}  # fmt: skip
OPTIONS = {"grpo": {"rewards": ["exact_match", {"name": "length", "target": 1, "weight": 0.5}]}}
TRAINING = {
    "dpo": {"max_length": 32}, "reward": {"max_length": 32}, "sft": {"max_length": 32},
    "grpo": {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
    "pretrain": {"packing": True, "max_length": 16},
}  # fmt: skip
METHODS = {
    "spiel": {"density": 0.05, "reselect_every": 2, "window": 1}, "s2ft": {"density": 0.1},
    "sora": {"r": 4}, "sltrain": {"r": 4, "density": 0.05}, "full": {},
    "lora": {"r": 4, "target_modules": "all-linear"},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, models, examples):
    def build(task, method, **sections):
        from sft.recipe.load import load_recipe

        examples(task)
        training = {
            "output_dir": str(tmp_path / "run"), "max_steps": 2, "logging_steps": 1,
            "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_strategy": "no",
            "use_cpu": True,
        }  # fmt: skip
        content = {
            "model": {"name": str(models(KINDS.get(task, "llama")))},
            "task": {"name": task} | OPTIONS.get(task, {}),
            "method": {"name": method} | METHODS.get(method, {}),
            "data": {"train": "rows.jsonl"},
            "evaluation": {"samples": 0, "max_new_tokens": 4},
            "forgetting": False,
            "training": training | TRAINING.get(task, {}),
        }
        for name, values in sections.items():
            content[name] = values if name == "zeroth_order" else content[name] | values
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return load_recipe(path)

    return build


@pytest.fixture
def run(recipe):
    def train(task, method, **sections):
        from rich.console import Console

        from sft.run.job import Job, train_from_recipe

        resolved = recipe(task, method, **sections)
        kept = {}
        save = Job.conclude

        def conclude(job, result):
            kept["model"], kept["job"] = job.model, job
            return save(job, result)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Job, "conclude", conclude)
            result = train_from_recipe(resolved, Console(quiet=True))
        return result, kept["job"], resolved

    return train


def every() -> list[tuple[str, str]]:
    dense = ["full", "lora"]
    pairs = [(task, method) for task in task_classes() for method in [*method_names(), *dense]]
    return [pair for pair in pairs if pair[0] != "pretrain"]


@pytest.mark.parametrize(("task", "method"), every(), ids=lambda value: value)
def test_a_run_ends_in_an_adapter_and_a_model_that_load(run, task, method):
    result, job, recipe = run(task, method)
    assert math.isfinite(result.train_loss)
    assert result.max_logit_difference is not None  # reloaded, and within its bound
    assert set(result.after) <= set(job.task.metrics) and result.after
    assert all(math.isfinite(value) for value in result.after.values())
    merged = result.output_dir / "merged"
    assert (merged / "config.json").is_file()
    if not job.method.saved:
        return
    # a fresh base with the same head, and the adapter
    from peft import PeftModel

    base = job.task.load_model(recipe.model, job.data, None)
    adapter = PeftModel.from_pretrained(base, result.output_dir / "adapter").eval()
    reloaded = _merged(merged)
    rows = job.held_out
    for batch in job.task.probe(adapter, job.processor, rows, job.data.format, 4, 32):
        with torch.no_grad():
            found, expected = adapter(**batch).logits, reloaded(**batch).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _merged(folder):
    from sft.export.reloaded import reload

    return reload(folder).eval()
