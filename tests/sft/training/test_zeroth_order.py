"""Zeroth-order training in the Trainer: what is trained, what stays, what a run can be asked."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from sft import S2FTConfig, SoRAConfig, SparseTrainer, SpielConfig, ZerothOrderConfig
from sft.adapters.calibrate import pending_adapters
from sft.zeroth_order.checks import check_run

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture
def train(lab):
    """Train a model without gradients; settings are of TrainingArguments or ZerothOrderConfig."""

    def run(out="run", resume=None, model=None, cls=None, data=None, **settings):
        names = set(ZerothOrderConfig.__dataclass_fields__) - {"seed"}
        ours = {key: settings.pop(key) for key in list(settings) if key in names}
        given = {"zeroth_order": ZerothOrderConfig(**ours)}
        if data is not None:
            given["train_dataset"] = data
        trainer = lab.trainer(
            out, model=model or lab.base(), cls=cls, trainer=given,
            **({"learning_rate": 1e-3, "lr_scheduler_type": "constant"} | settings),
        )  # fmt: skip
        trainer.train(resume)
        return trainer

    return run


def gradients(trainer) -> list[float]:
    """The projected gradients of a run, one after another."""
    return [g for row in trainer.optimizer.optimizer.log.rows for g in row.gradients]


def bits(model) -> dict[str, torch.Tensor]:
    return {
        n: p.detach().view(BITS[p.dtype]).clone() if p.dtype in BITS else p.detach().clone()
        for n, p in model.named_parameters()
    }


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("mode", ["exact", "inplace", "reference"])
def test_a_whole_model_learns_in_every_mode(train, mode) -> None:
    queries, steps, lr = (1, 160, 1e-3) if mode == "reference" else (4, 50, 4e-3)
    trainer = train(
        mode=mode, max_steps=steps, learning_rate=lr, queries=queries,
        per_device_train_batch_size=16,
    )  # fmt: skip
    assert np.mean(losses(trainer)[-10:]) < np.mean(losses(trainer)[:10]) - 0.06
    assert all(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_evaluating_changes_no_bit(train, lab, dtype) -> None:
    # Z4: twelve updates at learning rate 0 are evaluations alone
    model = lab.base().to(dtype)
    before = bits(model)
    train(model=model, learning_rate=0.0)
    assert equal(bits(model), before)
    train("inplace", model=model, learning_rate=0.0, mode="inplace")
    assert not equal(bits(model), before)  # so the test can tell


def test_an_error_in_an_update_leaves_the_weights_as_they_were(train, lab) -> None:
    model = lab.base().to(torch.bfloat16)
    before, calls = bits(model), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:  # the first is the look at where the model reads
            raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model=model)
    handle.remove()
    assert equal(bits(model), before)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_step_draws_nothing_from_the_global_generators(train, lab) -> None:
    # Z8
    states = []

    def state():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    class Watched(SparseTrainer):
        def training_step(self, *args, **kwargs):
            before = state()
            found = super().training_step(*args, **kwargs)
            states.append((before, state()))
            return found

    base = lab.base(attention_dropout=0.5)
    train(model=base, cls=Watched, dropout=True, max_steps=3)
    for before, after in states:
        assert torch.equal(before[0], after[0])
        assert np.array_equal(before[1], after[1])
        assert before[2] == after[2]
    assert len(states) == 3


class MeanOverMicroBatches(SparseTrainer):
    """Its loss is a mean over each micro-batch, which the Trainer divides by their number."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


@pytest.mark.parametrize("objective", ["loss", "accuracy"])
@pytest.mark.parametrize("cls", [SparseTrainer, MeanOverMicroBatches])
def test_accumulated_micro_batches_are_one_batch(train, cls, objective) -> None:
    # Z13, whoever divides by the number of micro-batches
    settings = {"max_steps": 3, "cls": cls, "objective": objective, "eps": 2e-2}
    one = train("one", per_device_train_batch_size=8, **settings)
    four = train("four", per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert any(abs(g) > 1e-2 for g in gradients(one))
    assert gradients(one) == pytest.approx(gradients(four), rel=1e-3, abs=2e-4)
    assert losses(one) == pytest.approx(losses(four), rel=1e-4)


def test_no_graph_is_ever_built(train, lab) -> None:
    # Z14
    seen = []
    model = lab.base()
    model.lm_head.register_forward_hook(
        lambda module, args, out: seen.append((out.requires_grad, torch.is_grad_enabled()))
    )
    train(model=model, max_steps=2)
    assert len(seen) == 1 + 2 * 2
    assert set(seen) == {(False, False)}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("objective", ["accuracy", "f1", "function"])
def test_an_objective_without_a_gradient_is_lowered(train, lab, objective) -> None:
    # Z14
    def wrong(model, inputs):
        guess = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.argmax(-1)
        return (guess != inputs["labels"]).float().mean()

    model = lab.base("LlamaForSequenceClassification", num_labels=2)
    trainer = train(
        model=model, data=lab.dataset(labels=2), per_device_train_batch_size=32, max_steps=60,
        objective=wrong if objective == "function" else objective, eps=2e-2, queries=4,
        learning_rate=2e-3,
    )  # fmt: skip
    shown = losses(trainer)
    assert np.mean(shown[-10:]) < np.mean(shown[:10]) - 0.05


def test_both_sides_see_the_same_dropout_masks(train, lab) -> None:
    # Z16: of a parameter that nothing reads, both sides have the very same loss
    def model():
        found = lab.base(attention_dropout=0.5)
        for parameter in found.parameters():
            parameter.requires_grad_(False)
        found.unread = nn.Parameter(torch.ones(3))
        return found

    on = train("on", model=model(), dropout=True, max_steps=4)
    off = train("off", model=model(), dropout=False, max_steps=4)
    assert gradients(on) == [0.0] * 4
    assert gradients(off) == [0.0] * 4
    assert all(a != b for a, b in zip(losses(on), losses(off), strict=True))


def test_dropout_masks_are_others_in_every_micro_batch(train, lab) -> None:
    model = lab.base(attention_dropout=0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.unread = nn.Parameter(torch.ones(3))
    seen = []

    class Watched(SparseTrainer):
        def training_step(self, *args, **kwargs):
            found = super().training_step(*args, **kwargs)
            seen.append(found.item())
            return found

    rows = lab.dataset(1).select([0] * 32)  # the same batch again and again
    train(
        model=model, cls=Watched, data=rows, dropout=True, max_steps=3, divergence=None,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    assert len(set(seen)) == len(seen) == 6


def test_smoothed_labels_are_there_on_every_side(train) -> None:
    # the Trainer takes them out of the batch that it is given
    found = gradients(train(max_steps=3, label_smoothing_factor=0.2))
    assert found != gradients(train("hard", max_steps=3))
    assert all(found)


def test_losses_of_a_bf16_model_are_taken_in_fp32(train, lab) -> None:
    # Z17: a bf16 loss near 0.7 has steps of 0.004, so g would be a multiple of 2
    model = lab.base("LlamaForSequenceClassification", num_labels=2).to(torch.bfloat16)
    data = lab.dataset(labels=2)
    found = gradients(train(model=model, data=data, max_steps=200, learning_rate=1e-6))
    assert len(set(found)) > 100


def adapter(lab, name):
    base = lab.base()
    configs = {
        "lora": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        "ia3": IA3Config(
            target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
        "support": SpielConfig(
            density=0.05, growth="none", selection="magnitude", task_type="CAUSAL_LM"
        ),
        "s2ft": S2FTConfig(density=0.1, task_type="CAUSAL_LM"),
        "sora": SoRAConfig(target_modules="all-linear", task_type="CAUSAL_LM", strength=0),
    }  # fmt: skip
    return get_peft_model(base, configs[name])


@pytest.mark.parametrize("name", ["lora", "ia3", "support", "s2ft", "sora"])
def test_any_adapter_is_trained_and_its_base_is_not(train, lab, name) -> None:
    model = adapter(lab, name)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = bits(model)
    trainer = train(model=model, max_steps=40, queries=4, eps=1e-2, learning_rate=1e-2)
    after = bits(model)
    assert all(torch.equal(after[n], before[n]) for n in after if n not in trained)
    assert any(not torch.equal(after[n], before[n]) for n in trained)
    assert np.mean(losses(trainer)[-8:]) < np.mean(losses(trainer)[:8])


@pytest.mark.parametrize("name", ["lora", "support", "s2ft"])
def test_an_adapter_gives_the_same_losses_whatever_the_mode(train, lab, name) -> None:
    # resident or not, exact or in place: one arithmetic up to rounding
    runs = [
        gradients(train(mode, model=adapter(lab, name), mode=mode, max_steps=3, eps=1e-2))
        for mode in ("exact", "inplace")
    ]
    assert runs[0] == pytest.approx(runs[1], abs=2e-3)


@pytest.mark.parametrize("name", [None, "lora", "support", "s2ft"])
@pytest.mark.parametrize("settings", [{}, {"mode": "inplace"}, {"update": "adam"}], ids=str)
def test_interrupted_and_resumed_is_uninterrupted(train, lab, name, settings) -> None:
    # Z9
    def model():
        return lab.base() if name is None else adapter(lab, name)

    settings = {"max_steps": 6, "weight_decay": 0.1, "dense_state": True} | settings
    whole = train("whole", model=model(), save_strategy="steps", save_steps=2, **settings)
    again = train("again", lab.checkpoint("whole", 2), model=model(), **settings)
    assert equal(bits(whole.model), bits(again.model))
    assert gradients(whole) == gradients(again)


def test_masks_are_those_of_the_start_after_a_resume(train, lab) -> None:
    settings = {"max_steps": 6, "sparsity": 0.75, "learning_rate": 1e-2}
    start = lab.base()
    whole = train("whole", save_strategy="steps", save_steps=2, **settings)
    again = train("again", lab.checkpoint("whole", 4), **settings)
    assert equal(bits(whole.model), bits(again.model))
    for t in again.optimizer.optimizer.trained:
        original = dict(start.named_parameters())[t.name]
        moved = t.parameter.detach() != original
        assert bool((original[moved].abs() <= t.mask.threshold).all())
        # norms are all ones: ties are trained
        assert 0 < moved.sum() <= (0.26 if original.dim() > 1 else 1) * moved.numel()


def test_a_tensor_of_zeros_is_left_out_with_a_message(train, caplog) -> None:
    # M7: an entry that leaves zero would be frozen for good
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    train(model=model, sparsity=0.5, max_steps=2)
    assert "tensors are left out" in caplog.text
    assert all(torch.equal(dict(model.named_parameters())[n], b) for n, b in biases.items())


def test_the_log_shows_the_estimate_and_no_gradient_norm(train) -> None:
    rows = [row for row in train(max_steps=2).state.log_history if "loss" in row]
    assert all("grad_norm" not in row for row in rows)
    assert all(row["projected_gradient"] > 0 and row["skipped_updates"] == 0 for row in rows)


def test_conservative_never_ends_above_where_it_started(train) -> None:
    # Z18, on one batch that is seen again and again
    trainer = train(
        update="conservative", max_steps=20, per_device_train_batch_size=32, learning_rate=3e-2
    )
    shown = losses(trainer)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(shown))
    assert 0.0 in gradients(trainer) or shown[-1] < shown[0]


REFUSED = [
    ({"sparsity": 0.5}, "lora", r"sparsity: got 0\.5 for an adapter"),
    ({}, "moving", r"growth: got 'gradient' in adapter 'default', which needs"),
    ({"update": "conservative", "gradient_accumulation_steps": 2}, None, "conservative"),
    ({"update": "adam"}, None, "dense_state"),
    ({"torch_compile": True}, None, "torch_compile"),
]


@pytest.mark.parametrize(("settings", "name", "message"), REFUSED, ids=str)
def test_what_cannot_be_honoured_is_refused(train, lab, settings, name, message) -> None:
    model = lab.adapted() if name == "moving" else adapter(lab, name) if name else lab.base()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        train(model=model, **settings)
    assert equal(bits(model), before)


def test_a_support_over_a_4_bit_base_is_trained_and_the_base_is_not(train, lab) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = lab.base(hidden_size=64, intermediate_size=64)
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            parent, _, leaf = name.rpartition(".")
            quantised = bnb.nn.Linear4bit(64, module.out_features, bias=False, quant_type="nf4")
            quantised.weight = bnb.nn.Params4bit(
                module.weight.data.clone(), requires_grad=False, quant_type="nf4"
            ).to("cpu")
            setattr(base.get_submodule(parent), leaf, quantised)
    config = SpielConfig(
        density=0.05, growth="none", target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        model.eval()(torch.arange(1, 13).view(2, 6))  # bitsandbytes packs it for CPUs in first use
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = train(
        model=model, max_steps=40, queries=4, eps=5e-2, learning_rate=4e-2,
        per_device_train_batch_size=16,
    )  # fmt: skip
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in frozen.items())
    assert np.mean(losses(trainer)[-8:]) < np.mean(losses(trainer)[:8])


def test_a_loss_scaler_is_refused(lab) -> None:
    trainer = lab.trainer(model=lab.base())
    trainer.args.fp16, trainer.accelerator.scaler = True, object()
    with pytest.raises(ValueError, match="fp16: its loss scaler"):
        check_run(trainer, ZerothOrderConfig())


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_engines_that_shard_weights_are_refused(lab, engine) -> None:
    trainer = lab.trainer(model=lab.base())
    setattr(trainer, f"is_{engine}_enabled", True)
    with pytest.raises(ValueError, match=f"{engine}: zeroth-order training .* torchrun"):
        check_run(trainer, ZerothOrderConfig())


@pytest.mark.parametrize("cls", [S2FTConfig, SpielConfig])
def test_a_support_chosen_by_gradients_is_chosen_before_they_end(train, lab, cls) -> None:
    still = {"growth": "none"} if cls is SpielConfig else {}
    config = cls(density=0.1, selection="gradient", task_type="CAUSAL_LM", **still)
    trainer = train(model=get_peft_model(lab.base(), config), max_steps=2)
    assert not pending_adapters(trainer.model)
    assert any(g != 0 for g in gradients(trainer))


def test_an_optimizer_of_gradients_is_refused(lab) -> None:
    model = lab.base()
    given = (torch.optim.SGD(model.parameters(), lr=1e-3), None)
    trainer = SparseTrainer(
        model, lab.arguments("run"), train_dataset=lab.dataset(), optimizers=given,
        zeroth_order=ZerothOrderConfig(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="optimizers: got a SGD"):
        trainer.train()
