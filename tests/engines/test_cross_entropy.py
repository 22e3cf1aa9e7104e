"""The loss in chunks is the model's own, with its gradients, whatever the head is."""

from __future__ import annotations

import pytest
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainingArguments

from sft import SparseTrainer, SpielConfig
from sft.chunked_loss import chunked_nll

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "recurrent": (
        "RecurrentGemma",
        {
            "logits_soft_cap": 2.0,
            "lru_width": 32,
            "attention_window_size": 16,
            "head_dim": 16,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "scaled": ("Cohere", {"logit_scale": 0.3}),
    "divided": ("Granite", {"logits_scaling": 4.0}),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
            "attn_pdrop": 0,
        },
    ),
    "experts": (
        "Mixtral",
        {
            "num_local_experts": 4,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.5,
            "experts_implementation": "eager",
        },
    ),
}
HEADS = ["frozen", "trained", "adapted", "saved"]


def build(name="llama", **changes):
    family, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | settings | changes)
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(transformers, family + kind)(config)


def with_head(model, kind):
    """Train the model with its head in one of the ways that heads take part."""
    if kind in ("frozen", "trained"):
        head = model.get_output_embeddings().weight
        head.requires_grad_(kind == "trained")
        return model
    targets = ["q_proj", "lm_head"] if kind == "adapted" else ["q_proj"]
    saved = ["lm_head"] if kind == "saved" else None
    return get_peft_model(
        model,
        SpielConfig(
            density=0.05,
            target_modules=targets,
            modules_to_save=saved,
            selection="random",
            task_type="CAUSAL_LM",
        ),
    )


def batch(rows=3, length=9, seed=1):
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 48, (rows, length), generator=drawn)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=drawn) < 0.4, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole_loss(model, count):
    """Return the model's loss from its own logits; the model itself rounds them to float32."""
    inputs = batch()
    labels = inputs.pop("labels")[:, 1:].flatten()
    outputs = model(**inputs)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    aux = 0.5 * outputs.aux_loss if "aux_loss" in outputs else 0
    return total / ((labels != -100).sum() if count is None else count) + aux


def check_same(model, rows=4, count=None):
    kwargs = {} if count is None else {"num_items_in_batch": count}
    own = whole_loss(model, count)
    assert model(**batch(), **kwargs).loss.item() == pytest.approx(own.item(), rel=1e-6)
    expected = gradients(model, own)
    found, _ = chunked_nll(model, batch(), count, rows=rows, compare=True)
    assert found.item() == pytest.approx(own.item(), rel=1e-10)
    got = gradients(model, found)
    assert got.keys() == expected.keys() and got
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_its_own_loss(name) -> None:
    check_same(build(name).double().train())


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_has_its_own_gradient(kind) -> None:
    check_same(with_head(build().double(), kind).train(), rows=5)


def test_micro_batches_share_a_count() -> None:
    check_same(build().double(), count=torch.tensor(37))


def test_no_labels_are_no_loss() -> None:
    inputs = batch()
    inputs["labels"].fill_(-100)
    for kind in HEADS:
        model = with_head(build(), kind)
        loss, _ = chunked_nll(model, inputs)
        loss.backward()
        assert loss.item() == 0


@pytest.mark.parametrize("kind", HEADS)
def test_logits_are_never_whole(kind, largest_tensor) -> None:
    model = with_head(build(vocab_size=4096), kind).train()
    inputs, rows = batch(rows=4, length=80), 8
    labels = int((inputs["labels"][:, 1:] != -100).sum())
    assert labels > 150

    def chunks():
        chunked_nll(model, inputs, rows=rows)[0].backward()

    weight = 4096 * 32 * 4  # a trained head has a gradient of its size
    assert largest_tensor(chunks) <= max(weight, rows * 4096 * 4) < labels * 4096 * 4 / 4
    assert largest_tensor(lambda: model(**inputs).loss.backward()) >= labels * 4096 * 4


class Squared(transformers.LlamaForCausalLM):
    """Does something to its logits that no configuration names."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits.square()
        return found


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    model = Squared(build().config)
    with pytest.raises(ValueError, match=r"chunked_loss: got logits of Squared that are"):
        chunked_nll(model, batch(), compare=True)


# -- the trainer ---------------------------------------------------------------------------------


def rows():
    data = [batch(rows=1, seed=seed) for seed in range(24)]
    return Dataset.from_list([{k: v[0].tolist() for k, v in row.items()} for row in data])


def trainer(folder, *, chunked, model=None, compute_metrics=None, **settings):
    arguments = {
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    torch.manual_seed(0)
    return SparseTrainer(
        model=with_head(build(), "adapted") if model is None else model,
        args=TrainingArguments(str(folder), **arguments | settings),
        train_dataset=rows(),
        eval_dataset=rows().select(range(8)),
        chunked_loss=chunked,
        compute_metrics=compute_metrics,
    )


def test_a_run_is_that_of_whole_logits(tmp_path) -> None:
    runs = {}
    for chunked in (False, True):
        run = trainer(tmp_path / str(chunked), chunked=chunked)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        values = {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}
        runs[chunked] = losses, values, run.evaluate()["eval_loss"]
    assert runs[True][0] == pytest.approx(runs[False][0], abs=1e-5)
    for name, value in runs[False][1].items():
        torch.testing.assert_close(runs[True][1][name], value, rtol=1e-4, atol=1e-5)
    assert runs[True][2] == pytest.approx(runs[False][2], abs=1e-5)


def test_a_run_in_half_precision_is_that_of_whole_logits(tmp_path) -> None:
    losses = {}
    for chunked in (False, True):
        model = with_head(build(tie_word_embeddings=False), "frozen")
        run = trainer(
            tmp_path / str(chunked), chunked=chunked, model=model, bf16=True, learning_rate=1e-4
        )
        run.train()
        losses[chunked] = [e["loss"] for e in run.state.log_history if "loss" in e]
    assert losses[True] == pytest.approx(losses[False], abs=1e-3)


def test_who_reads_logits_gets_them_whole(tmp_path) -> None:
    seen = []
    run = trainer(
        tmp_path,
        chunked=True,
        compute_metrics=lambda found: seen.append(found.predictions.shape) or {},
    )
    run.evaluate()
    assert seen == [(8, 9, 48)]


def test_evaluation_of_the_loss_alone_makes_no_logits(tmp_path, largest_tensor) -> None:
    run = trainer(tmp_path, chunked=True, model=build(vocab_size=4096))
    run.evaluate()  # the first one compares
    whole = 8 * 9 * 4096 * 4
    assert largest_tensor(run.evaluate) < whole
    run.chunked_loss = False
    assert largest_tensor(run.evaluate) >= whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1 with chunked_loss"),
        ({"model": "t5"}, "chunked_loss: got a T5ForConditionalGeneration"),
        ({"model": "classifier"}, "chunked_loss: got a LlamaForSequenceClassification"),
    ],
    ids=["smoothing", "t5", "classifier"],
)
def test_other_losses_are_refused(settings, message, tmp_path) -> None:
    made = {
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=16, num_layers=1)
        ),
        "classifier": lambda: transformers.LlamaForSequenceClassification(build().config),
    }
    settings = dict(settings)
    if "model" in settings:
        settings["model"] = made[settings["model"]]()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, chunked=True, **settings)
