"""The `offload` section of a recipe: what is refused, and a run to its export."""

from __future__ import annotations

import json

import pytest

from sft.errors import UserError
from sft.recipe.load import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


@pytest.fixture
def wider_model(tmp_path, save_model):
    """A model whose matrices are large enough to be worth a file."""
    return save_model(tmp_path / "wider", hidden_size=64)


def test_a_run_from_disk_exports_what_it_trained(recipe_file, wider_model, tmp_path) -> None:
    from sft.run.job import train_from_recipe

    offload = "offload={base: disk, optimizer: cpu}"
    here = [f"model.name={wider_model}", "training.use_cpu=true", "training.bf16=false"]
    run = train_from_recipe(load_recipe(recipe_file, [*here, offload]))
    assert run.max_logit_difference == 0
    assert run.all_weights > 2 * 7 * 64 * 64  # counted before they went
    assert run.after["nll"] < run.before["nll"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"]["offload"] == {"base": "disk", "optimizer": "cpu", "folder": None}
    assert not list((tmp_path / "run" / "offload").iterdir())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{base: gpu}", "offload.base: got 'gpu'"),
        ("{}", "offload.base: got none, and no optimizer"),
        ("{base: cpu, folder: x}", "offload.folder: got one with base cpu"),
        ("{bse: cpu}", "offload.bse"),
    ],
    ids=["gpu", "nothing", "folder", "unknown"],
)
def test_a_wrong_section_is_refused(section, message, recipe_file) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(recipe_file, [f"offload={section}"])
