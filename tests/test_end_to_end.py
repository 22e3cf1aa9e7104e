"""The main job on the real model, and the README's example, as a user runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sft.adapters.packing import unpack

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "training.max_steps=6",
    "method.reselect_every=3",
    "evaluation.num_examples=6",
    "evaluation.metrics=[token_error_rate, nll]",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The quickstart on SmolLM2-135M, six updates with two reselections."""
    pytest.importorskip("gguf")
    from sft.recipe.load import load_recipe
    from sft.run.job import train_from_recipe

    folder = tmp_path_factory.mktemp("quickstart")
    recipe = load_recipe("quickstart", [*SHORT, f"training.output_dir={folder}"])
    return train_from_recipe(recipe)


READ = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
}
# of other tasks and data each runs whole in tests/recipes
RECIPES = [
    name
    for name, recipe in READ.items()
    if "task" not in recipe
    and recipe["data"]["train"] == "cmudict"
    and "deepspeed" not in recipe["training"]
]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_on_the_real_model(name, tmp_path) -> None:
    pytest.importorskip("gguf")
    from sft.recipe.load import load_recipe
    from sft.run.job import train_from_recipe

    settings = ["evaluation.num_examples=4", "evaluation.metrics=[nll]", "training.max_steps=3"]
    recipe = load_recipe(name, [*settings, f"training.output_dir={tmp_path / 'run'}"])
    run = train_from_recipe(recipe)
    assert run.after["nll"] < run.before["nll"]
    assert run.max_logit_difference is not None
    assert (tmp_path / "run/merged/model.safetensors").is_file()


@pytest.mark.slow
def test_the_quickstart_learns_and_exports_what_it_trained(run) -> None:
    assert run.after["nll"] < 0.75 * run.before["nll"]
    assert run.max_logit_difference == 0
    assert run.trained_weights == round(0.025 * 36_495_360)  # of o and down


@pytest.mark.slow
def test_the_merged_model_differs_from_its_base_on_the_support_alone(run) -> None:
    from sft.embedded import folder_of

    base = load_file(folder_of("smollm2-135m-instruct") / "model.safetensors")
    merged = load_file(run.output_dir / "merged/model.safetensors")
    adapter = load_file(run.output_dir / "adapter/adapter_model.safetensors")
    assert base.keys() == merged.keys()
    moved = 0
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.delta_"
        indices = None
        if f"{key}indices" in adapter:
            count = adapter[f"{key}values"].numel()
            indices = unpack(adapter[f"{key}indices"], count, weight.numel(), name)
        changed = (weight != merged[name]).flatten().nonzero().flatten()
        allowed = torch.empty(0, dtype=torch.int64) if indices is None else indices.long()
        assert bool(torch.isin(changed, allowed).all()), name
        moved += changed.numel()
    assert 0.5 * run.trained_weights < moved <= run.trained_weights


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, llama) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "tiny")
    code, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"HuggingFaceTB/SmolLM2-135M"' in code
    monkeypatch.chdir(tmp_path)
    rows = torch.randint(0, 48, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    names = {"rows": Dataset.from_dict({"input_ids": rows, "labels": rows})}
    exec(code.replace("HuggingFaceTB/SmolLM2-135M", "tiny"), names)
    merged = AutoModelForCausalLM.from_pretrained("out/merged")
    base = AutoModelForCausalLM.from_pretrained("tiny")
    different = [
        name
        for (name, a), b in zip(merged.named_parameters(), base.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert different
    assert all("proj" in name for name in different)
