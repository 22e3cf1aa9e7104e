"""The plug-in does for axolotl what a recipe does here."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from sft.errors import UserError
from sft.trainer import SparseTrainingMixin

BLOCKS = {
    "spiel": {"density": 0.05},
    "s2ft": {"density": 0.2},
    "sora": {"r": 2},
    "sltrain": {"density": 0.05, "r": 2},
}


@pytest.fixture
def base(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


def test_all_methods_are_offered_and_none_of_them_as_a_lora(plugin):
    found = plugin.get_adapter_capabilities()
    assert {one.name for one in found} == set(BLOCKS)
    assert not any(one.lora_like for one in found)


@pytest.mark.parametrize("name", list(BLOCKS))
def test_a_block_puts_the_method_on(plugin, base, name):
    model, config = plugin.load_adapter(base, {"adapter": name, "sparse": BLOCKS[name]})
    assert model.peft_config["default"] is config
    assert config.peft_type.value.lower() == name
    assert config.task_type == "CAUSAL_LM"
    assert all(getattr(config, key) == value for key, value in BLOCKS[name].items())


def test_an_adapter_comes_back_and_trains_on(plugin, base, tmp_path):
    cfg = {"adapter": "spiel", "sparse": {"density": 0.05}}
    model, _ = plugin.load_adapter(base, cfg)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and "values" in name:
                value.add_(0.25)
    expected = model.state_dict()
    model.save_pretrained(tmp_path)
    plain = model.unload()
    for inference in (False, True):
        again, _ = plugin.load_adapter(plain, cfg | {"lora_model_dir": str(tmp_path)}, inference)
        assert any(value.requires_grad for value in again.parameters()) is not inference
        assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
        plain = again.unload()


def test_preferences_get_the_configuration_alone(plugin):
    assert (
        plugin.load_adapter(None, {"adapter": "sora", "sparse": {"r": 3}}, config_only=True)[1].r
        == 3
    )


def test_trainers_are_axolotls_with_our_training(plugin):
    cfg = {"adapter": "spiel"}
    plugin.register(cfg)
    assert issubclass(plugin.get_trainer_cls(cfg), SparseTrainingMixin)
    cfg = {"adapter": "spiel", "rl": "dpo"}
    plugin.register(cfg)
    # axolotl hands model and reference to the class of this key, to that of a plug-in it does not
    assert plugin.get_trainer_cls(cfg) is None
    module, _, name = cfg["trainer_cls"].rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), name), SparseTrainingMixin)


def test_other_adapters_are_left_alone(plugin, base):
    cfg = {"adapter": "lora"}
    plugin.register(cfg)
    assert cfg == {"adapter": "lora"}
    assert plugin.load_adapter(base, cfg) is None
    assert plugin.get_trainer_cls(cfg) is None


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"adapter": "spiel", "sparse": {"densty": 0.1}}, "sparse.densty: .*'density'"),
        ({"adapter": "spiel", "sparse": {"density": "1e-3"}}, "sparse.density: expected a number"),
        ({"adapter": "spiel", "sparse": {"density": 2.0}}, "density"),
        ({"adapter": "spiel", "sparse": 3}, "sparse: got 3"),
        ({"adapter": "sltrain", "sparse": {"form": "pretrain"}}, "sft train"),
        ({"adapter": "spil", "sparse": {"density": 0.1}}, "'spiel'"),
        ({"adapter": "spiel", "rl": "kto"}, "rl: got 'kto'.*dpo"),
        ({"adapter": "spiel", "reward_model": True}, "reward_model: .*task: reward"),
    ],
    ids=["key", "type", "value", "block", "random", "name", "rl", "reward"],
)
def test_what_does_not_fit_is_said_before_a_model_is_loaded(plugin, cfg, message):
    with pytest.raises(UserError, match=message) as caught:
        plugin.register(cfg)
    assert "\n" not in str(caught.value)


def test_the_block_passes_axolotls_validation(plugin):
    module, _, name = plugin.get_input_args().rpartition(".")
    settings = getattr(importlib.import_module(module), name)
    assert settings(sparse={"density": 0.1}).sparse == {"density": 0.1}
    assert settings().sparse is None


def test_the_module_is_imported_without_axolotl():
    code = "import sys; sys.modules['axolotl'] = None; import sft.integrations.axolotl"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert done.returncode == 0
