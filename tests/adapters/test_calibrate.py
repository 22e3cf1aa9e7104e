"""Batches that choose a support: what each rank's count for, and what is left behind."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

from sft import SpielConfig
from sft.adapters.calibrate import calibrate
from sft.adapters.labels import count_labels

SMALL = {"vocab_size": 48, "num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 1}
LABELS = torch.tensor([[-100, 5, -100, 7], [3, -100, -100, 9]])


def bert():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SMALL, intermediate_size=48)).eval()


def bart():
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    parts = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers",)}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    config = BartConfig(vocab_size=48, **sizes, **parts, **heads, max_position_embeddings=16)
    return BartForConditionalGeneration(config).eval()


def batch(seed, labels):
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 48, labels.shape, generator=drawn)
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart"])
def test_labels_are_counted_as_the_loss_counts_them(name, request) -> None:
    """A mean over n labels is n times smaller than the sum that the loss makes by itself."""
    made = {"bert": bert, "bart": bart}.get(name)
    model = made() if made else request.getfixturevalue(name)()
    inputs = batch(0, LABELS)
    with torch.no_grad():
        mean = model(**inputs).loss
        if name in ("llama", "gpt2"):
            total = model(**inputs, num_items_in_batch=1).loss
        else:
            logits = model(**inputs).logits.flatten(0, 1)
            total = torch.nn.functional.cross_entropy(logits, LABELS.flatten(), reduction="sum")
    assert count_labels(model, LABELS) == round(float(total / mean))
    assert count_labels(model, torch.tensor([1, 0, -100])) == 2, "a label a row"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_ranks_of_unequal_labels_choose_as_one_that_reads_all(name, request, together) -> None:
    first = LABELS.clone()
    second = torch.full_like(LABELS, -100)
    second[0, :3] = torch.tensor([4, 6, 8])

    build = bert if name == "bert" else request.getfixturevalue("llama")
    models = [build() for _ in range(3)]  # not in threads, which draw from one generator

    def choose(batches, **ranks):
        config = SpielConfig(
            target_modules=["query"] if name == "bert" else ["q_proj"], density=0.05,
            selection="gradient", calibration_batches=1,
        )  # fmt: skip
        model = get_peft_model(models.pop(), config).train()
        calibrate(model, batches, **ranks)
        assert model.training and all(p.grad is None for p in model.parameters())
        return {n: b.clone() for n, b in model.named_buffers() if "ind" in n}

    parts = [batch(0, first), batch(1, second)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    alone = choose([whole])
    assert alone
    for found in together(lambda ranks: choose([parts[ranks.rank]], ranks=ranks)):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[n], alone[n]) for n in alone)


# -- one process ---------------------------------------------------------------------------------


def pending(model, batches=2, **fields):
    config = SpielConfig(
        target_modules=["q_proj"], density=0.05, selection="gradient", growth="none",
        calibration_batches=batches, **fields,
    )  # fmt: skip
    return get_peft_model(model, config)


def stream(count, labels=LABELS):
    """Batches of a stream, which has no length, and what was read of it."""
    read = []

    def batches():
        for seed in range(count):
            read.append(seed)
            yield batch(seed, labels)

    return batches(), read


def test_as_many_batches_are_read_as_the_configuration_says(llama) -> None:
    batches, read = stream(5)
    assert calibrate(pending(llama()), batches) == 2
    assert read == [0, 1]


def test_gradients_reach_no_parameter_where_an_engine_counts_them(llama) -> None:
    supports = []
    for accumulate in (True, False):
        model, reached = pending(llama()), []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(reached.append)
        calibrate(model, stream(2)[0], accumulate=accumulate)
        assert bool(reached) == accumulate
        supports.append([b.clone() for n, b in model.named_buffers() if "indices" in n])
    assert supports[0] and all(torch.equal(a, b) for a, b in zip(*supports, strict=True))


def test_a_support_that_is_trained_is_not_undone(llama) -> None:
    model = pending(llama())
    calibrate(model, stream(2)[0])
    calibrate(model, stream(2)[0])
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[-1] = 1.0
    with pytest.raises(ValueError, match=r"^calibration: adapter 'default' is trained already"):
        calibrate(model, stream(2)[0])


def test_what_gives_no_gradient_is_refused_and_nobody_listens_on(llama) -> None:
    for batches, message in {
        "none": (stream(0)[0], "got no batches"),
        "no labels": ([{"input_ids": torch.ones(1, 4, dtype=torch.int64)}], "give no loss"),
        "fails": ([{"input_ids": torch.full((1, 4), 99)}], "index out of range"),
    }.values():
        model = pending(llama())
        with pytest.raises((ValueError, IndexError), match=message):
            calibrate(model, batches)
        layers = [m for m in model.modules() if hasattr(m, "site")]
        assert layers and all(layer.site("default").tap is None for layer in layers)


def test_a_selection_that_reads_nothing_is_refused(llama) -> None:
    model = get_peft_model(llama(), SpielConfig(density=0.05, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"^selection: got 'random', which reads no batches"):
        calibrate(model, stream(1)[0])
