"""What users do around a zeroth-order run: train again, in parts, with callbacks and odd models."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback

from sft import SoRAConfig, ZerothOrderConfig
from sft.optim.zeroth_order.log import ZerothOrderLog
from sft.run.folder import ZEROTH_ORDER
from sft.undisturbed import FullPrecisionLosses
from sft.zeroth_order.log import LOG
from sft.zeroth_order.objectives import predictions
from sft.zeroth_order.replay import replay_onto


@pytest.fixture
def build(lab):
    """Build a trainer; `zo` are fields of ZerothOrderConfig, the others of TrainingArguments."""

    def make(model=None, *, zo=None, data=None, eval_data=None, callbacks=(), **settings):
        given = {"zeroth_order": ZerothOrderConfig(**(zo or {})), "callbacks": list(callbacks)}
        given |= {} if data is None else {"train_dataset": data}
        given |= {} if eval_data is None else {"eval_dataset": eval_data}
        given |= {"model_init": model} if callable(model) and not hasattr(model, "train") else {}
        return lab.trainer(
            model=None if "model_init" in given else model or lab.base(), trainer=given,
            **({"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 4} | settings),
        )  # fmt: skip

    return make


def gradients(trainer) -> list[float]:
    return [g for row in trainer.optimizer.optimizer.log.rows for g in row.gradients]


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_model_that_a_model_init_makes_is_the_one_that_is_trained(build, lab) -> None:
    trainer = build(lambda: lab.base())
    discarded = trainer.model
    trainer.train()
    assert all(gradients(trainer))
    assert trainer.model is not discarded
    assert same(weights(discarded), weights(lab.base()))
    assert not any(map(torch.equal, weights(trainer.model), weights(lab.base())))
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_training_again_goes_on_with_new_directions(build, lab, caplog) -> None:
    trainer = build()
    trainer.train()
    before = weights(trainer.model)
    trainer.train()
    assert trainer.optimizer.optimizer.updates == 8
    assert not same(before, weights(trainer.model))
    assert all(p.requires_grad for p in trainer.model.parameters())
    # one log of both, from the start of the first
    again = lab.base()
    replay_onto(again, ZerothOrderLog.load(lab.folder / "run" / ZEROTH_ORDER / LOG))
    assert same(weights(again), weights(trainer.model))
    assert "the weights were changed" not in caplog.text
    trainer.model.lm_head.weight.data.zero_()
    trainer.train()
    assert "the weights were changed" in caplog.text


def test_training_another_part_with_the_same_optimizer_is_refused(build) -> None:
    trainer = build()
    trainer.train()
    trainer.model.lm_head.weight.requires_grad_(False)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=r"model: got 20 parameters .* trainer\.optimizer = None"):
        trainer.train()
    assert same(before, weights(trainer.model))
    trainer.optimizer = None
    trainer.train()
    head = [p for n, p in trainer.model.named_parameters() if n == "lm_head.weight"]
    assert not head[0].requires_grad
    assert same(before[-1:], head)
    assert trainer.optimizer.optimizer.updates == 4


class Fails(TrainerCallback):
    """Raises after an update, once."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error: type[BaseException] | None = error

    def on_step_end(self, args, state, control, **_):
        if self.error is not None and state.global_step == 2:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("mode", ["exact", "inplace"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_training_after_an_error_is_as_ever(build, mode, error) -> None:
    trainer = build(callbacks=[Fails(error)], zo={"mode": mode}, gradient_accumulation_steps=2)
    with pytest.raises(error):
        trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
    trainer.train()
    assert trainer.optimizer.optimizer.updates == 2 + 4


class Looks(TrainerCallback):
    """Runs the model whenever it is called, as callbacks do that sample or measure."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step_end(self, args, state, control, model, **_):
        ids = torch.arange(1, 13).view(1, 12)
        with torch.no_grad():
            self.losses.append(float(model(input_ids=ids, labels=ids).loss))

    on_step_begin = on_substep_end = on_step_end


@pytest.mark.parametrize("mode", ["exact", "inplace"])
def test_what_callbacks_and_evaluation_see_are_the_weights_as_they_are(build, lab, mode) -> None:
    looks = Looks()
    settings = {"gradient_accumulation_steps": 2, "zo": {"mode": mode, "eps": 0.1}}
    watched = build(
        callbacks=[looks], eval_data=lab.dataset(8), eval_strategy="steps", eval_steps=1,
        learning_rate=0.0, **settings,
    )  # fmt: skip
    plain = build(learning_rate=0.0, **settings)
    expected = plain.evaluate(lab.dataset(8))["eval_loss"]
    watched.train()
    plain.train()
    assert gradients(watched) == gradients(plain)
    assert looks.losses == pytest.approx([looks.losses[0]] * 12, abs=1e-5)
    seen = [row["eval_loss"] for row in watched.state.log_history if "eval_loss" in row]
    assert seen == pytest.approx([expected] * 4, abs=1e-5)


def test_an_uneven_last_accumulation_counts_what_there_is(build, lab) -> None:
    # 5 rows in batches of 1: updates of 2, 2 and 1 micro-batches
    data = lab.dataset(5)
    uneven = build(
        data=data, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        num_train_epochs=1, max_steps=-1,
    )  # fmt: skip
    whole = build(data=data, per_device_train_batch_size=2, num_train_epochs=1, max_steps=-1)
    uneven.train()
    whole.train()
    assert len(gradients(uneven)) == 3
    assert gradients(uneven) == pytest.approx(gradients(whole), rel=1e-3, abs=2e-4)


def test_the_best_model_is_loaded_at_the_end(build, lab) -> None:
    trainer = build(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, learning_rate=3e-2, zo={"eps": 1e-2},
        eval_data=lab.dataset(8),
    )  # fmt: skip
    trainer.train()
    seen = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen), abs=1e-6)
    assert len(set(seen)) == 4


class Dropped(nn.Module):
    """Asks itself, not a module below it, whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 8)
        self.seen: list[bool] = []

    def forward(self, input_ids, labels):
        self.seen.append(self.training)
        x = functional.dropout(self.table(input_ids), 0.5, self.training)
        return {"loss": x.square().sum(-1).mean()}


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_of_the_model_itself_is_off_as_well(build, dropout) -> None:
    model = Dropped()
    build(model, zo={"dropout": dropout}, max_steps=1).train()
    assert model.seen == [dropout] * 3
    assert model.training
    assert not model._forward_hooks


@pytest.mark.parametrize("name", ["huber_loss", "mse_loss", "soft_margin_loss", "l1_loss"])
def test_any_loss_of_half_precision_is_taken_in_fp32(name) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 9).to(torch.bfloat16), torch.randn(2, 9).to(torch.bfloat16)
    loss = getattr(functional, name)
    with FullPrecisionLosses():
        assert torch.equal(loss(a, target=b), loss(a.float(), b.float()))


def test_modules_to_save_and_two_active_adapters_are_trained(build, lab) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    model = get_peft_model(lab.base(), config)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    model.base_model.set_adapter(["default", "other"])
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    build(model, zo={"eps": 1e-2}).train()
    for name, parameter in model.named_parameters():
        trained, start = before[name]
        assert torch.equal(parameter, start) != trained, name
        assert parameter.requires_grad == trained
    kinds = {n.split(".")[-2] if "lora" in n else n for n, (t, _) in before.items() if t}
    assert {"default", "other"} <= kinds
    assert any("modules_to_save" in kind for kind in kinds)


def gated(lab):
    config = SoRAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", strength=0.1)
    return get_peft_model(lab.base(), config)


def kept(lab):
    return lab.adapted(growth="none", saved_inputs="int8")


def compiled(lab):
    model = lab.base()
    model.model.layers[0].compile(backend="eager")
    return model


REFUSED = [
    (gated, {}, r"strength: got 0\.1 in adapter 'default', which needs gradients; set 0"),
    (kept, {}, r"saved_inputs: got 'int8' in adapter 'default', which needs gradients; set full"),
    (compiled, {}, r"model: is compiled, .* mode='inplace'"),
    (None, {"optim": "sgd"}, r"optim: got .*sgd.*, of an optimizer of gradients; leave it out, "),
    (None, {"optim_args": "eps=1"}, r"optim_args: got 'eps=1', of an optimizer of gradients"),
    (None, {"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha: got 5\.0, .* dropout=True"),
]


@pytest.mark.parametrize(
    ("make", "settings", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_what_would_be_ignored_is_refused_in_one_line(build, lab, make, settings, message) -> None:
    model = None if make is None else make(lab)
    with pytest.raises(ValueError, match=rf"^{message}.*$"):
        build(model, **settings).train()


def test_weights_on_several_devices_are_refused(build) -> None:
    trainer = build()
    trainer.model.lm_head.to("meta")  # as an offloaded part
    with pytest.raises(ValueError, match=r"^device_map: puts what is trained on cpu, meta; .*$"):
        trainer.train()


def test_a_compiled_model_is_trained_in_place(build, lab) -> None:
    plain, other = build(zo={"mode": "inplace"}), build(compiled(lab), zo={"mode": "inplace"})
    plain.train()
    other.train()
    assert gradients(other) == pytest.approx(gradients(plain), abs=1e-4)
    assert any(gradients(other))


@pytest.mark.parametrize("betas", [0.9, None, (0.9,), (0.9, 1.0), "ab"])
def test_betas_that_are_no_pair_are_refused_like_any_field(betas) -> None:
    with pytest.raises(ValueError, match=r"^betas: got .*, allowed is two numbers in \[0, 1\)$"):
        ZerothOrderConfig(betas=betas)


IDS = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(0))


def masked():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "adapted", "masked"])
def test_predictions_are_of_the_labels_that_the_loss_is_of(llama, gpt2, name) -> None:
    # the loss over one label alone tells which position it was compared with
    torch.manual_seed(0)
    model = {
        "llama": llama, "gpt2": gpt2, "masked": masked,
        "adapted": lambda: get_peft_model(gpt2(), LoraConfig(fan_in_fan_out=True)).eval(),
    }[name]()  # fmt: skip
    labels = torch.full_like(IDS, -100)
    labels[:, 3] = IDS[:, 3]
    inputs = {"input_ids": IDS, "labels": labels}
    with torch.no_grad():
        logits, loss = model(**inputs).logits, model(**inputs).loss
        predicted, wanted = predictions(model, dict(inputs))
    places = [
        place
        for place in range(6)
        if torch.isclose(functional.cross_entropy(logits[:, place], IDS[:, 3]), loss)
    ]
    assert places == ([3] if name == "masked" else [2])
    assert torch.equal(wanted, IDS[:, 3])
    assert torch.equal(predicted, logits[:, places[0]].argmax(-1))


def test_predictions_of_an_encoder_decoder_are_not_shifted() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS, labels=IDS).logits
        predicted, wanted = predictions(model, {"input_ids": IDS, "labels": IDS})
    assert torch.equal(predicted, logits.argmax(-1).flatten())
    assert torch.equal(wanted, IDS.flatten())


def test_gradient_checkpointing_changes_nothing(build, lab) -> None:
    config = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")

    def run(**settings):
        torch.manual_seed(0)
        trainer = build(get_peft_model(lab.base(), config), zo={"eps": 1e-2}, **settings)
        trainer.train()
        return gradients(trainer)

    assert run(activation_checkpointing=True) == run()
