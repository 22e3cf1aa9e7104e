"""What PEFT's own test-suite once found (see tests/conformance), kept as quick tests."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import sft
from sft.adapters.methods.spiel import SpielConfig


@pytest.fixture
def adapted(llama):
    def build(base=None, **more):
        return get_peft_model(base or llama(), SpielConfig(density=0.05), **more)

    return build


def test_the_tuner_does_not_hide_the_layers_of_its_base(llama):
    base = llama().model
    assert get_peft_model(base, SpielConfig(density=0.05)).base_model.layers is base.layers


def test_a_second_adapter_finds_the_linear_layers_of_an_adapted_model(adapted):
    model = adapted()
    model.add_adapter("other", SpielConfig(density=0.05))
    tuner = model.base_model
    assert tuner.adapted_layers("default").keys() == tuner.adapted_layers("other").keys()
    assert len(tuner.adapted_layers("other")) == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_memory", [False, True])
def test_deltas_are_float32_unless_asked_to_follow_the_base(llama, adapted, dtype, low_memory):
    def dtypes(model):
        return {p.dtype for n, p in model.named_parameters() if "delta_values" in n}

    more = {"low_cpu_mem_usage": low_memory}
    assert dtypes(adapted(llama().to(dtype), **more)) == {torch.float32}
    followed = adapted(llama().to(dtype), autocast_adapter_dtype=False, **more)
    assert dtypes(followed) == {dtype}
    assert all(p.requires_grad for n, p in followed.named_parameters() if "delta_values" in n)


@pytest.mark.parametrize("config", [SpielConfig(density=0.1), sft.SoRAConfig(r=2)])
def test_a_matrix_that_its_module_never_calls_is_refused(config):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

    config.target_modules = ["out_proj"]
    with pytest.raises(ValueError, match=r"^target_modules: 'attention.out_proj' is read by"):
        get_peft_model(Model(), config)
