"""What FSDP can't shard is refused with the key, the reason and what runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from sft import S2FTConfig, SLTrainConfig, SoRAConfig, SpielConfig
from sft.engines.find import check_engine
from sft.engines.fsdp import FsdpEngine
from sft.engines.fsdp_settings import check_fsdp

METHODS = {
    "compact_after": SoRAConfig(r=4, compact_after=2, task_type="CAUSAL_LM"),
    "layout": S2FTConfig(density=0.5, layout="permuted", task_type="CAUSAL_LM"),
    "per_layer_updates": SLTrainConfig(density=0.05, per_layer_updates=True, task_type="CAUSAL_LM"),
    "allocation": S2FTConfig(
        density=0.1, allocation="pooled", selection="activation", task_type="CAUSAL_LM"
    ),
}


def trainer(model, **plugin):
    settings = {"fsdp_version": 2, "cpu_ram_efficient_loading": False} | plugin
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**settings))
    return SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(state=state),
        args=SimpleNamespace(fsdp=True, device=torch.device("cpu")),
        is_fsdp_enabled=True,
        is_deepspeed_enabled=False,
    )


@pytest.mark.parametrize("key", METHODS)
def test_settings_of_a_method(llama, key) -> None:
    model = get_peft_model(llama(), METHODS[key])
    with pytest.raises(ValueError, match=rf"^{key}: got .* under FSDP, .*; set {key}=\S+$"):
        check_fsdp(trainer(model))


@pytest.mark.parametrize(
    ("plugin", "remedy"),
    [({"fsdp_version": 1}, "set version: 2"), ({"cpu_ram_efficient_loading": True}, "to false")],
    ids=["version", "loading"],
)
def test_settings_of_the_plugin(llama, plugin, remedy) -> None:
    model = get_peft_model(llama(), SpielConfig(density=0.05, task_type="CAUSAL_LM"))
    check_fsdp(trainer(model))
    with pytest.raises(ValueError, match=rf"^fsdp_config\.\w+: got .*{remedy}$"):
        check_fsdp(trainer(model, **plugin))


def test_sharding_that_accelerate_passes_over(llama) -> None:
    asked = trainer(llama())
    asked.is_fsdp_enabled = False
    with pytest.raises(ValueError, match=r"^fsdp: got true on cpu, where accelerate shards noth"):
        check_engine(asked)


def test_values_of_two_dtypes(llama) -> None:
    model = get_peft_model(llama(), SpielConfig(density=0.05, task_type="CAUSAL_LM"))
    next(p for p in model.parameters() if p.requires_grad).data = torch.zeros(1).bfloat16()
    with pytest.raises(ValueError, match=r"^fsdp: got trained parameters of bfloat16 and float32"):
        check_fsdp(trainer(model))


def test_optimizers_that_step_no_shards() -> None:
    stock = type("AdamW8bit", (), {"__module__": "bitsandbytes.optim.adamw"})()
    engine = FsdpEngine(torch.nn.Linear(2, 2), SimpleNamespace(optimizer=stock), SimpleNamespace())
    with pytest.raises(ValueError, match=r"^optim: got AdamW8bit under FSDP, .*; set optim=adamw_"):
        engine.check(SimpleNamespace())
    engine.close()
