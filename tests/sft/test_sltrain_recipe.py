"""Recipes of SLTrain: both forms run, and a start that does not fit is named."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from sft.errors import RecipeError, UserError
from sft.models import load_config
from sft.recipe.load import load_recipe
from sft.recipe.schema import ModelSpec
from sft.run.job import train_from_recipe


@pytest.fixture
def sltrain_file(recipe_file):
    """Write a recipe of one form; `model` is what stands below the model's name."""

    def write(form: str, model: str = ""):
        text = recipe_file.read_text().replace("method:\n  name: spiel\n", f"{model}method:\n")
        text = text.replace(
            "  reselect_every: 2\n  window: 1\n", f"  name: sltrain\n  form: {form}\n"
        )
        recipe_file.write_text(text)
        return recipe_file

    return write


@pytest.mark.parametrize("form", ["finetune", "pretrain"])
def test_a_recipe_trains_and_exports_a_stock_model(sltrain_file, form) -> None:
    model = "  config:\n    num_hidden_layers: 1\n" if form == "pretrain" else ""
    recipe = load_recipe(sltrain_file(form, model))
    result = train_from_recipe(recipe, Console(file=io.StringIO()))
    assert result.after["nll"] < result.before["nll"]
    assert (result.trained_weights == result.all_weights) == (form == "pretrain")
    stock = AutoModelForCausalLM.from_pretrained(result.output_dir / "merged")
    assert len(stock.model.layers) == (1 if form == "pretrain" else 2)
    assert result.max_logit_difference < 1e-3
    config = json.loads((result.output_dir / "adapter/adapter_config.json").read_text())
    assert config["form"] == form


def test_random_weights_and_method_must_agree(sltrain_file) -> None:
    with pytest.raises(RecipeError, match=r"tiny\.yaml:\d+: method: trains random weights; add"):
        load_recipe(sltrain_file("pretrain"))
    with pytest.raises(RecipeError, match=r"model\.config: asks for random weights, "):
        load_recipe(sltrain_file("pretrain"), ["model.config={}", "method.form=finetune"])


def test_the_configuration_is_the_named_models(tiny_model) -> None:
    spec = ModelSpec(name=str(tiny_model), config={"num_hidden_layers": 5})
    config = load_config(spec)
    assert (config.num_hidden_layers, config.hidden_size) == (5, 32)
    misspelt = ModelSpec(name=str(tiny_model), config={"num_hiden_layers": 5})
    with pytest.raises(UserError, match=r"^model\.config: unknown key; did you mean 'num_hidden_l"):
        load_config(misspelt)


def test_shipped_recipes_resolve() -> None:
    beside, scratch = load_recipe("sltrain"), load_recipe("sltrain_pretrain")
    assert (beside.method["form"], scratch.method["form"]) == ("finetune", "pretrain")
    assert torch.float32 == getattr(torch, scratch.model.dtype)
