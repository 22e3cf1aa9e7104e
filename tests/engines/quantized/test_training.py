"""Over a packed base a method trains as over the dense weights that the packed ones stand for."""

from __future__ import annotations

import pytest
import torch

from sft import S2FTConfig, SLTrainConfig, SoRAConfig, SpielConfig
from sft.adapters.layer import sparse_layers

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

NF4 = {"bits": "nf4"}
NESTED = {"bits": "fp4", "double_quant": True}
INT8 = {"bits": "int8"}
MOVES = {"density": 0.05, "reselect_every": 3, "window": 2, "task_type": "CAUSAL_LM"}
STAYS = {"density": 0.05, "growth": "none", "task_type": "CAUSAL_LM"}
SLICES = {"density": 0.1, "task_type": "CAUSAL_LM"}
METHODS = {
    "spiel-gradient": SpielConfig(**MOVES),
    "spiel-momentum": SpielConfig(**MOVES | {"growth": "momentum", "window": 1}),
    "spiel-magnitude": SpielConfig(**STAYS, selection="magnitude"),
    "spiel-embedding": SpielConfig(**MOVES, target_modules=["embed_tokens", "q_proj"]),
    "s2ft": S2FTConfig(**SLICES),
    "s2ft-output-side": S2FTConfig(**SLICES, roles=["up", "gate", "down"]),
    "sora": SoRAConfig(r=4, task_type="CAUSAL_LM"),
    "sltrain": SLTrainConfig(r=4, task_type="CAUSAL_LM"),
}
# chosen by what flows through, which int8 rounds: near ties fall otherwise there
CALIBRATED = {
    "spiel-fisher": SpielConfig(**STAYS, selection="fisher"),
    "s2ft-activation": S2FTConfig(**SLICES, selection="activation"),
    "s2ft-product": S2FTConfig(**SLICES, selection="product"),
}


def assert_trained_alike(packed, dense):
    assert packed.keys() == dense.keys()
    for name, tensor in packed.items():
        if name.endswith("_base"):  # of no fingerprint, and of one
            continue
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32, name
            torch.testing.assert_close(tensor, dense[name], atol=1e-5, rtol=0, msg=name)
        else:
            assert torch.equal(tensor, dense[name]), name


FORMS = {"nf4": NF4, "fp4-double": NESTED, "int8": INT8}
EVERYWHERE = ("spiel-gradient", "s2ft", "sora", "sltrain")
CASES = [
    *((form, name) for form in FORMS for name in METHODS if form == "nf4" or name in EVERYWHERE),
    pytest.param("int8", "spiel-momentum", marks=pytest.mark.engines),
    pytest.param("int8", "spiel-embedding", marks=pytest.mark.engines),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_packed_base_trains_as_its_dense_twin(lab, kind, name):
    form = FORMS[kind]
    config = METHODS[name]
    base = lab.packed(form)
    before = lab.base_bytes(base)
    packed = lab.adapt(base, config)
    lab.train(packed)
    dense = lab.adapt(lab.twin(form), config)
    lab.train(dense)
    assert_trained_alike(lab.state(packed), lab.state(dense))
    assert any(t.is_floating_point() and bool(t.any()) for t in lab.state(packed).values())
    assert lab.base_bytes(packed.get_base_model()) == before


@pytest.mark.parametrize("name", CALIBRATED)
def test_batches_choose_as_over_the_dense_twin(lab, name):
    packed = lab.adapt(lab.packed({"bits": "nf4"}), CALIBRATED[name])
    lab.train(packed, max_steps=3)
    dense = lab.adapt(lab.twin({"bits": "nf4"}), CALIBRATED[name])
    lab.train(dense, max_steps=3)
    assert_trained_alike(lab.state(packed), lab.state(dense))


def chosen(adapted):
    layers = sparse_layers(adapted).items()
    return {(name, i) for name, layer in layers for i in layer.support("default").tolist()}


@pytest.mark.engines
@pytest.mark.parametrize("name", CALIBRATED)
def test_batches_choose_over_8_bits_up_to_near_ties(lab, name):
    runs = [lab.adapt(base, CALIBRATED[name]) for base in (lab.packed(INT8), lab.packed(INT8))]
    runs.append(lab.adapt(lab.twin(INT8), CALIBRATED[name]))
    start = chosen(runs[0])
    for adapted in runs:
        lab.train(adapted, max_steps=3)
    packed, again, dense = map(chosen, runs)
    assert again == packed
    assert len(start & dense) < 0.5 * len(dense)
    assert len(packed & dense) >= 0.9 * len(dense)


@pytest.mark.parametrize("name", ["spiel-gradient", "s2ft", "sora", "sltrain"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(lab, name):
    nf4 = {"bits": "nf4", "double_quant": True}
    whole = lab.adapt(lab.packed(nf4), METHODS[name])
    lab.train(whole, save_strategy="steps", save_steps=3, out="whole")
    again = lab.adapt(lab.packed(nf4), METHODS[name])
    lab.train(again, resume=str(lab.out / "whole" / "checkpoint-3"), out="again")
    expected = lab.state(whole)
    for part, tensor in lab.state(again).items():
        assert torch.equal(tensor, expected[part]), part


def test_the_permuted_layout_is_refused_with_the_layout_that_works(lab):
    config = S2FTConfig(density=0.5, layout="permuted", roles=["down"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"layout: got 'permuted'.*quantised.*layout='index'"):
        lab.adapt(lab.packed({"bits": "nf4"}), config)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.engines)])
def test_forward_passes_alone_train_an_adapter_over_a_packed_base(lab, kind):
    from functools import partial

    from sft import SparseTrainer, ZerothOrderConfig

    config = SpielConfig(**STAYS)
    model = lab.adapt(lab.packed({"bits": kind}), config)
    before = lab.base_bytes(model.get_base_model())
    zeroth = ZerothOrderConfig(eps=5e-2, queries=2)
    trainer = lab.train(
        model, cls=partial(SparseTrainer, zeroth_order=zeroth), learning_rate=2e-2, max_steps=20
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert lab.base_bytes(model.get_base_model()) == before


def test_a_dense_method_over_packed_weights_is_refused(lab):
    from sft.run.full import Full

    with pytest.raises(ValueError, match="name: got 'full', which trains the model's own weights"):
        Full("full", {}, "CAUSAL_LM").attach(lab.packed({"bits": "int8"}), None)
