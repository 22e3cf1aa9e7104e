"""Supports chosen by batches that have no labels: the trainer says what the loss is."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from sft import S2FTConfig, SpielConfig, ZerothOrderConfig
from sft.adapters.layer import sparse_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def classes(name):
    import trl

    import sft

    return getattr(sft, f"Sparse{name}Trainer"), getattr(trl, f"{name}Config")


def model_of(name, llama):
    from transformers import LlamaForSequenceClassification

    if name != "Reward":
        return llama()
    torch.manual_seed(0)
    return LlamaForSequenceClassification(llama(num_labels=1).config)


def task_of(name):
    return "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"


def spiel(name):
    return SpielConfig(
        density=0.1, growth="none", selection="gradient", calibration_batches=2,
        target_modules=["o_proj", "down_proj"], task_type=task_of(name),
    )  # fmt: skip


def slices(name, selection):
    return S2FTConfig(
        density=0.2, selection=selection, calibration_batches=2, task_type=task_of(name)
    )


CONFIGS = {
    "spiel": spiel,
    "s2ft-gradient": lambda name: slices(name, "gradient"),
    "s2ft-activation": lambda name: slices(name, "activation"),
}


def preference_loss(model, batch):
    """DPO at its start, where policy and reference are one (arXiv:2305.18290, equation 7)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["input_ids"][:, 1:]
    each = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    said = (each * batch["completion_mask"][:, 1:]).sum(-1)
    chosen, rejected = said.chunk(2)
    ratios = (chosen - chosen.detach()) - (rejected - rejected.detach())
    return -torch.nn.functional.logsigmoid(0.1 * ratios).mean()


def test_the_support_is_where_the_gradient_of_preferences_is_largest(train, llama):
    trainer = train(*classes("DPO"), get_peft_model(llama(), spiel("DPO")))
    seen, ask = [], trainer.sparse_callback.objective

    def noting(batch):
        seen.append(batch)
        return ask(batch)

    trainer.sparse_callback.objective = noting
    trainer.train()
    assert len(seen) == 2

    scores, dense = {}, llama()
    for batch in seen:
        dense.zero_grad()
        preference_loss(dense, batch).backward()
        for name, parameter in dense.named_parameters():
            scores[name] = scores.get(name, 0) + parameter.grad.abs()
    found = sparse_layers(trainer.model)
    assert len(found) == 4
    for name, layer in found.items():
        score = scores[name.removeprefix("base_model.model.") + ".weight"].flatten()
        support = layer.support("default").long()
        best = score.topk(len(support)).indices.sort().values
        assert torch.equal(best, support), name


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["DPO", "GRPO", "Reward"])
def test_whatever_chooses_is_chosen_and_not_counted(train, llama, name, config):
    trainer = train(*classes(name), get_peft_model(model_of(name, llama), CONFIGS[config](name)))
    trainer.train()
    assert not any(layer.pending for layer in sparse_layers(trainer.model).values())
    assert not any(trainer._metrics["eval"].values())  # nothing was evaluated but the choice


def test_forward_passes_train_what_gradients_chose(train, llama):
    model = get_peft_model(llama(), spiel("DPO"))
    build, config_class = classes("DPO")
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = train(
        lambda **given: build(zeroth_order=ZerothOrderConfig(), **given), config_class, model
    )
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
