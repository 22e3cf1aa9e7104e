"""Checkpointed layers are recomputed from the lowest trained one upwards, and bits are the same."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sft import S2FTConfig, SoRAConfig, SparseCallback, SparseTrainer, SpielConfig
from sft.adapters.layer import sparse_layers

LAYERS = 4
UPPER = r".*layers\.[23]\..*_proj"
COUPLED = r".*layers\.[23]\..*(o|down)_proj"
# per method, its settings where the upper half of the layers is trained
CASES = {
    "spiel": (SpielConfig, {"density": 0.05, "reselect_every": 2, "window": 1}),
    "spiel-momentum": (
        SpielConfig,
        {"density": 0.05, "reselect_every": 2, "window": 1, "growth": "momentum"},
    ),
    "spiel-int8": (SpielConfig, {"density": 0.05, "saved_inputs": "int8"}),
    "s2ft": (S2FTConfig, {"ratio": 0.2, "target_modules": COUPLED}),
    "s2ft-permuted": (
        S2FTConfig,
        {"ratio": 0.2, "target_modules": COUPLED, "layout": "permuted"},
    ),
    "sora": (SoRAConfig, {"r": 4, "dropout": 0.1}),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(case="spiel", **changes):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )
    owner, settings = CASES[case]
    settings = {"target_modules": UPPER, "task_type": "CAUSAL_LM"} | settings | changes
    return get_peft_model(base, owner(**settings))


def trainer(folder, adapted, *, on=True, cls=SparseTrainer, kwargs=None, **settings):
    first = torch.randint(1, 64, (32, 1), generator=torch.Generator().manual_seed(1))
    ids = ((first + 3 * torch.arange(12)) % 63 + 1).tolist()
    arguments = {
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    name = "activation_checkpointing"
    extra = {name: on, f"{name}_kwargs": kwargs}
    found = cls(
        model=adapted,
        args=TrainingArguments(str(folder), **arguments | extra | settings),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[SparseCallback()],
    )
    return found


class Counter:
    """Counts how often each layer runs, and notes whose output has a gradient."""

    def __init__(self, adapted) -> None:
        self.runs = [0] * LAYERS
        self.graph = [False] * LAYERS
        layers = adapted.get_base_model().model.layers
        for i, layer in enumerate(layers):
            # a recomputed layer runs its modules, but not itself
            layer.mlp.register_forward_pre_hook(lambda *_, i=i: self.count(i))
            layer.register_forward_hook(lambda _, args, out, i=i: self.look(i, out))

    def count(self, i):
        self.runs[i] += 1

    def look(self, i, out):
        self.graph[i] |= (out[0] if isinstance(out, tuple) else out).requires_grad


def own(adapted):
    return {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}


def supports(adapted):
    return {n: t.clone() for n, t in adapted.named_buffers() if "indices" in n}


def assert_equal(left, right):
    assert left.keys() == right.keys() and left
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("case", CASES)
def test_layers_below_the_trained_ones_run_once(case, tmp_path) -> None:
    plain, checked = model(case), model(case)
    trainer(tmp_path / "plain", plain, on=False).train()
    # TRL and PEFT ask for gradients of the inputs too, and lose what would take it back
    checked.enable_input_require_grads()
    counter = Counter(checked)
    base = {n: p.detach().clone() for n, p in checked.named_parameters() if not p.requires_grad}
    trainer(tmp_path / "checked", checked).train()
    assert counter.runs[:2] == [4, 4] and counter.runs[2:] == [8, 8]
    assert counter.graph == [False, False, True, True]
    if case != "spiel-int8":  # whose noise is drawn anew in the second run
        assert_equal(own(checked), own(plain))
    for name, parameter in checked.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


@pytest.mark.engines
def test_batches_choose_the_same_support(tmp_path) -> None:
    chosen = {"selection": "gradient", "growth": "none"}
    plain, checked = model(**chosen), model(**chosen)
    start = supports(checked)
    trainer(tmp_path / "plain", plain, on=False).train()
    counter = Counter(checked)
    trainer(tmp_path / "checked", checked).train()
    assert counter.runs[2] - counter.runs[0] >= 4  # training's four passes are run anew above
    assert_equal(own(checked), own(plain))
    assert_equal(supports(checked), supports(plain))
    assert any(not torch.equal(start[name], found) for name, found in supports(checked).items())


def test_accumulated_and_resumed_is_uninterrupted(tmp_path) -> None:
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    whole, again = model(), model()
    trainer(tmp_path / "whole", whole, **settings).train()
    resumed = trainer(tmp_path / "again", again, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(own(again), own(whole))


def test_trained_embeddings_have_a_gradient(tmp_path) -> None:
    adapted = model(target_modules=r".*(embed_tokens|layers\.3\..*_proj)", selection="random")
    before, counter = own(adapted), Counter(adapted)
    trainer(tmp_path, adapted).train()
    assert counter.runs == [8] * LAYERS
    moved = {n for n, value in own(adapted).items() if not torch.equal(value, before[n])}
    assert any("embed_tokens" in name for name in moved)


def test_a_stock_trainer_recomputes_no_more(tmp_path) -> None:
    adapted = model()
    counter = Counter(adapted)
    trainer(tmp_path, adapted, cls=Trainer).train()
    assert counter.runs == [4, 4, 8, 8]
    adapted.train()
    assert adapted.get_input_embeddings()(torch.tensor([1])).requires_grad  # as it was before


def test_resident_weights_are_the_same_when_recomputed(tmp_path) -> None:
    adapted = model()
    seen = []
    layer = next(layer for name, layer in sparse_layers(adapted).items() if "layers.3" in name)
    layer.register_forward_hook(lambda *_: seen.append(layer.content))
    trainer(tmp_path, adapted).train()
    assert len(seen) == 8 and None not in seen
    assert seen[::2] == seen[1::2] and len(set(seen)) == 4


def test_reentrant_checkpoints_are_told_what_they_cost(tmp_path, caplog) -> None:
    adapted = model()
    with caplog.at_level(logging.WARNING, "sft.recompute"):
        trainer(tmp_path, adapted, kwargs={"use_reentrant": True}).train()
    assert "use_reentrant=True recomputes every layer" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sft.recompute"):
        trainer(tmp_path, model()).train()
    assert not caplog.records
