"""The reference of DPO and GRPO: the base or the adapter as it was, bit for bit, without a copy."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from sft.adapters.registry import method_names

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def bytes_of(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


@torch.no_grad()
def log_probs(trainer, batch):
    """Return the log-probabilities that the policy of a DPO trainer gives the replies."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = trainer.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
    return found.log_probs.sum(1).chunk(2)


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("given", ["ready", "peft_config"])
@pytest.mark.parametrize("method", method_names())
def test_the_reference_of_a_new_adapter_is_the_base_to_the_bit(
    train, llama, method_config, method, given
):
    from trl import DPOConfig

    from sft import SparseDPOTrainer

    config = method_config(method)
    if given == "ready":
        trainer = train(SparseDPOTrainer, DPOConfig, get_peft_model(llama(), config))
    else:
        trainer = train(SparseDPOTrainer, DPOConfig, llama(), peft_config=config)
    assert set(trainer.model.peft_config) == {"default"} and trainer.ref_model is None
    trainer.train()
    # while training, policy and reference start as the same function
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == 0.0 and first["rewards/chosen"] == 0.0
    batch = batch_of(trainer)
    found = trainer.compute_ref_log_probs(trainer.model, batch)
    base = train(SparseDPOTrainer, DPOConfig, llama(), out="base")
    assert_same(found, log_probs(base, batch))
    assert not torch.equal(log_probs(trainer, batch)[0], found[0])


@pytest.mark.parametrize("precomputed", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("method", method_names())
def test_a_trained_adapter_keeps_its_start_as_reference(
    train, llama, method_config, tmp_path, method, precomputed
):
    from trl import DPOConfig

    from sft import SparseDPOTrainer

    start = get_peft_model(llama(), method_config(method, init_weights=False))
    start.save_pretrained(tmp_path / "start")

    def begun(out):
        model = PeftModel.from_pretrained(llama(), tmp_path / "start", is_trainable=True)
        precompute = precomputed and out == "run"
        return train(
            SparseDPOTrainer, DPOConfig, model, out=out, precompute_ref_log_probs=precompute
        )

    trainer = begun("run")
    assert set(trainer.model.peft_config) == {"default", "ref"}
    batch = batch_of(trainer)
    expected = log_probs(begun("start"), batch)
    if precomputed:
        assert_same((batch["ref_chosen_logps"], batch["ref_rejected_logps"]), expected)
    trainer.train()
    assert_same(trainer.compute_ref_log_probs(trainer.model, batch), expected)
    assert not torch.equal(log_probs(trainer, batch)[0], expected[0])
    if not precomputed:
        assert trainer.state.log_history[0]["rewards/margins"] == 0.0


@pytest.mark.parametrize("method", ["spiel", "s2ft"])
def test_policy_training_holds_on_to_the_base(train, llama, method_config, method):
    from trl import GRPOConfig

    from sft import SparseGRPOTrainer

    model = get_peft_model(llama(), method_config(method))
    trainer = train(SparseGRPOTrainer, GRPOConfig, model, beta=0.1)
    assert set(trainer.model.peft_config) == {"default"} and trainer.ref_model is None
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences[0] == 0.0  # the policy is the base, bit for bit
    assert divergences[-1] > 0.0


def test_an_adapter_costs_its_own_bytes_and_full_training_a_second_model(
    train, llama, method_config
):
    from trl import DPOConfig

    from sft import SparseDPOTrainer

    base = bytes_of(llama())
    sparse = train(SparseDPOTrainer, DPOConfig, get_peft_model(llama(), method_config("spiel")))
    trained = sum(p.numel() * 4 for p in sparse.model.parameters() if p.requires_grad)
    assert bytes_of(sparse.model) == base + trained and sparse.ref_model is None
    full = train(SparseDPOTrainer, DPOConfig, llama())
    assert bytes_of(full.model) + bytes_of(full.ref_model) == 2 * base
    full.train()
    for name, parameter in llama().named_parameters():
        assert torch.equal(full.ref_model.get_parameter(name), parameter)
