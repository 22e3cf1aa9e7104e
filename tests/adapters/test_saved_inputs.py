"""Methods that can keep inputs in fewer bits: less is saved, and nothing else changes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import sft
from sft import S2FTConfig, SLTrainConfig, SpielConfig

PRODUCERS = ["q", "k", "v", "gate", "up"]
METHODS = {
    "spiel": lambda form: SpielConfig(density=0.05, saved_inputs=form, task_type="CAUSAL_LM"),
    "sltrain": lambda form: SLTrainConfig(r=2, saved_inputs=form, task_type="CAUSAL_LM"),
    "s2ft": lambda form: S2FTConfig(
        roles=PRODUCERS, ratio=0.5, saved_inputs=form, task_type="CAUSAL_LM"
    ),
}


def trained(llama: Any, randomize: Any, method: str, form: str) -> Any:
    model = get_peft_model(llama(), METHODS[method](form)).train()
    randomize(model)
    return model


def step(model: Any, batch: dict[str, Any]) -> tuple[float, list[Tensor], int]:
    """Loss, gradients, and bytes that were saved of activations."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return loss.item(), gradients, sum(saved.values())


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "aside"])
@pytest.mark.parametrize("method", METHODS)
def test_less_is_saved_and_the_gradient_is_close(
    llama, batch, randomize, method: str, resident: bool
) -> None:
    found = {}
    for form in ("full", "bfloat16", "int8"):
        model = trained(llama, randomize, method, form)
        torch.manual_seed(0)
        if resident:
            with sft.resident(model):
                found[form] = step(model, batch)
        else:
            found[form] = step(model, batch)
    loss, exact, most = found["full"]
    for form, bound in (("bfloat16", 0.01), ("int8", 0.05)):
        same_loss, close, bytes_saved = found[form]
        assert same_loss == loss
        assert bytes_saved < most
        errors = [((g - e).norm() / e.norm()).item() for g, e in zip(close, exact, strict=True)]
        assert 0 < max(errors) < bound
    assert found["int8"][2] < found["bfloat16"][2]


@pytest.mark.parametrize("method", METHODS)
def test_the_form_is_one_of_those_there_are(method: str) -> None:
    with pytest.raises(ValueError, match=r"^saved_inputs: got 'fp8', allowed is .*$"):
        METHODS[method]("fp8")


@pytest.mark.parametrize("method", METHODS)
def test_a_file_remembers_it(llama, batch, randomize, method: str, tmp_path) -> None:
    trained(llama, randomize, method, "int8").save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    assert again.peft_config["default"].saved_inputs == "int8"
    state = torch.get_rng_state()
    again(**batch).loss.backward()
    assert not torch.equal(torch.get_rng_state(), state)


def test_off_by_default(llama, batch, randomize) -> None:
    for method in METHODS:
        assert type(METHODS[method]("full"))().saved_inputs == "full"
        model = trained(llama, randomize, method, "full")
        state = torch.get_rng_state()
        model(**batch).loss.backward()
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernel", ["compose", "factored", "resident"])
def test_each_way_of_sltrain_keeps_codes(llama, batch, randomize, kernel: str) -> None:
    way = {} if kernel == "resident" else {"kernel": kernel}
    config = SLTrainConfig(r=2, saved_inputs="int8", task_type="CAUSAL_LM", **way)
    model = get_peft_model(llama(), config).train()
    randomize(model)
    saved: list[Tensor] = []
    with (
        sft.resident(model) if kernel == "resident" else nullcontext(),
        saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        model(**batch)
    assert any(t.dtype == torch.int8 for t in saved)
