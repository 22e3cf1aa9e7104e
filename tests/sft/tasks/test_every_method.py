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
def recipe(tmp_path, models, rows_file):
    def build(task, of, **sections):
        from sft.recipe.load import load_recipe

        training = {
            "output_dir": str(tmp_path / "run"), "max_steps": 2, "logging_steps": 1,
            "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_strategy": "no",
            "use_cpu": True,
        }  # fmt: skip
        content = {
            "model": {"name": str(models(KINDS.get(task, "llama")))},
            "task": {"name": task} | OPTIONS.get(task, {}),
            "method": {"name": of} | METHODS.get(of, {}),
            "data": {"train": str(rows_file(task)), "eval_examples": 4},
            "evaluation": {"samples": 0, "max_new_tokens": 4},
            "forgetting": False,
            "training": training | TRAINING.get(task, {}),
        }
        for name, values in sections.items():
            content[name] = content.get(name, {}) | values
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return load_recipe(path)

    return build


@pytest.fixture
def run(recipe):
    """Train by a recipe; return the result, the job, and its base weights as they ended up."""

    def train(task, of, **sections):
        from rich.console import Console

        from sft.run.job import Job, train_from_recipe

        resolved = recipe(task, of, **sections)
        kept = {}
        whole = Job.conclude

        def conclude(job, result):
            inner = getattr(job.model, "base_model", job.model)
            inner = getattr(inner, "model", inner) if job.method.saved else inner
            kept["job"] = job
            kept["base"] = {n: p.detach().clone() for n, p in inner.named_parameters()}
            return whole(job, result)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Job, "conclude", conclude)
            result = train_from_recipe(resolved, Console(quiet=True))
        return result, kept["job"], kept["base"]

    return train


def every() -> list[tuple[str, str]]:
    """Return all pairs but those that have no meaning: adapters over random frozen weights."""
    methods = [*method_names(), "full", "lora"]
    tasks = [name for name, task in task_classes().items() if not task.from_random]
    return [(task, method) for task in tasks for method in methods]


@pytest.mark.parametrize(("task", "method"), every(), ids=lambda value: value)
def test_a_run_ends_in_an_adapter_and_a_model_that_load(run, task, method):
    result, job, base = run(task, method)
    check_ended(result, job)
    if not job.method.saved:
        return
    fresh = job.task.load_model(job.recipe.model, job.data, None)
    heads = tuple(f"{head}." for head in job.task.heads(fresh))
    for name, parameter in fresh.named_parameters():
        if not name.startswith(heads):
            place = next(n for n in base if n.replace(".base_layer", "") == name)
            assert torch.equal(base[place], parameter), name
    assert_reloads(result, job, fresh)


@pytest.mark.parametrize(
    ("task", "method"), [(task, "full") for task in task_classes() if task != "pretrain"]
    + [("dpo", "s2ft"), ("classification", "lora"), ("seq2seq", "s2ft")], ids=lambda value: value,
)  # fmt: skip
def test_every_task_trains_by_forward_passes(run, task, method):
    more = {"num_iterations": 2} if task == "grpo" else {}
    result, job, _ = run(task, method, zeroth_order={}, training={"learning_rate": 1e-3} | more)
    check_ended(result, job)


@pytest.mark.parametrize("method", ["full", "sltrain"])
def test_random_weights_train_on_packed_text(run, method):
    form = {"form": "pretrain"} if method == "sltrain" else {}
    result, job, _ = run("pretrain", method, model={"config": {}}, method=form)
    check_ended(result, job)
    assert result.before["nll"] == pytest.approx(math.log(13), abs=0.5)  # it knows nothing yet
    assert job.probes.forgetting is None


def check_ended(result, job):
    """Assert that a run trained, measured, and exported what it trained."""
    assert math.isfinite(result.train_loss)
    assert result.max_logit_difference is not None  # reloaded, and within its bound
    assert result.after and set(result.after) <= set(job.task.metrics)
    assert all(math.isfinite(value) for value in result.after.values())


def assert_reloads(result, job, fresh):
    """Assert that the adapter on a fresh base is the merged model, both read from disk."""
    from peft import PeftModel

    from sft.export.reloaded import reload

    adapter = PeftModel.from_pretrained(fresh, result.output_dir / "adapter").eval()
    merged = reload(result.output_dir / "merged").eval()
    for batch in job.task.probe(adapter, job.processor, job.held_out, job.data.format, 4, 32):
        with torch.no_grad():
            found, expected = adapter(**batch).logits, merged(**batch).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
