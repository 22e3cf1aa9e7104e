from __future__ import annotations

import itertools

import pytest
import torch

from sft.errors import UserError
from sft.evaluation import forgetting
from sft.evaluation.forgetting import Forgetting, alert, describe, judge
from sft.evaluation.general_text import general_text, windows
from sft.evaluation.reduced import divergence, reduce
from sft.evaluation.spec import ForgettingSpec


def distributions(seed: int, spread: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(50, 64, generator=draw)).log_softmax(-1)


def whole_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(1).double()


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_the_whole_vocabulary_gives_the_whole_divergence(spread):
    p, q = distributions(0, spread), distributions(1, spread)
    found = divergence(reduce(p, 64), q)
    torch.testing.assert_close(found, whole_divergence(p, q), atol=1e-5, rtol=1e-4)


def test_fewer_tokens_never_give_more_and_more_give_more():
    p, q = distributions(0, 2.0), distributions(1, 2.0)
    found = [divergence(reduce(p, kept), q) for kept in (1, 4, 16, 64)]
    for fewer, more in itertools.pairwise(found):
        assert (fewer <= more + 1e-6).all()
    assert found[0].mean() < 0.8 * found[-1].mean()
    assert found[0].min() >= -1e-6


def test_a_model_does_not_diverge_from_itself():
    p = distributions(0, 3.0)
    assert divergence(reduce(p, 8), p).abs().max() < 1e-6


def test_eight_bytes_are_kept_of_a_token():
    kept = reduce(distributions(0, 1.0), 8)
    assert sum(t.numel() * t.element_size() for t in kept) == 50 * 8 * 8


@pytest.fixture
def loaded(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    return model, AutoTokenizer.from_pretrained(tiny_model)


def numbers(tmp_path, count: int = 300) -> str:
    path = tmp_path / "general.txt"
    words = ["one", "two", "three", "four", "five"]
    path.write_text("\n".join(" ".join(words[(i * j) % 5] for j in range(9)) for i in range(count)))
    return str(path)


def test_the_loss_is_that_of_the_model_on_each_window(loaded, tmp_path):
    model, tokenizer = loaded
    spec = ForgettingSpec(data=numbers(tmp_path), max_tokens=100, window=40)
    read = windows(spec, tokenizer, model)
    assert [len(window) for window in read] == [40, 40, 20]
    with torch.no_grad():
        losses = [float(model(w[None], labels=w[None]).loss) * (len(w) - 1) for w in read]
    assert judge(model, read).loss == pytest.approx(sum(losses) / 97, rel=1e-5)


def test_a_window_is_no_longer_than_the_model_reads(loaded, tmp_path):
    model, tokenizer = loaded
    spec = ForgettingSpec(data=numbers(tmp_path), max_tokens=200)
    assert max(len(w) for w in windows(spec, tokenizer, model)) == 64


def test_every_window_begins_as_a_text_does(loaded, tmp_path):
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = loaded
    tokenizer.bos_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    spec = ForgettingSpec(data=numbers(tmp_path), max_tokens=50, window=20)
    read = windows(spec, tokenizer, model)
    assert [int(w[0]) for w in read] == [0, 0, 0]
    assert all((w[1:] != 0).all() for w in read[:2])
    assert max(map(len, read)) == 20


def test_too_short_a_text_is_refused(loaded, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("one")
    with pytest.raises(UserError, match="got 1 tokens, allowed is 2 or more"):
        windows(ForgettingSpec(data=str(path), max_tokens=9), loaded[1], loaded[0])


def moved(model, by: float):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn_like(parameter)
    return model


def test_what_moves_is_reported_and_what_does_not_is_none(loaded, tmp_path):
    model, tokenizer = loaded
    spec = ForgettingSpec(data=numbers(tmp_path), max_tokens=200, threshold=0.05)
    watch = Forgetting(spec, tokenizer, model)
    watch.read_base(model)
    same = watch.report(model)
    assert (same["loss_after"], same["alert"]) == (same["loss_before"], False)
    assert abs(same["kl"]) < 1e-6
    section = watch.report(moved(model, 0.3))
    assert section["loss_after"] > section["loss_before"] + 0.05
    assert section["kl"] > 0.01
    assert section["alert"]
    assert section["perplexity_after"] == pytest.approx(2.718281828 ** section["loss_after"])
    assert section["tokens"] == 200 - len(watch.windows)
    assert set(section) >= {"text", "tokens", "loss_before", "loss_after", "kl", "threshold"}
    assert "nats, more than the threshold 0.05; train less" in alert(section)
    assert alert(same) is None
    assert "KL from the base" in describe(section)


def test_a_loss_that_is_no_number_is_an_alert(loaded, tmp_path):
    model, tokenizer = loaded
    watch = Forgetting(ForgettingSpec(data=numbers(tmp_path)), tokenizer, model)
    watch.read_base(model)
    assert watch.forgets(float("nan"))
    assert not watch.forgets(watch.before.loss + watch.spec.threshold / 2)


def test_the_divergence_is_that_of_whole_distributions(loaded, tmp_path):
    model, tokenizer = loaded
    read = windows(ForgettingSpec(data=numbers(tmp_path), max_tokens=120), tokenizer, model)
    with torch.no_grad():
        before = [model(w[None]).logits[0, :-1].log_softmax(-1) for w in read]
    kept: list = []
    judge(model, read, keep=kept)
    moved(model, 0.2)
    with torch.no_grad():
        after = [model(w[None]).logits[0, :-1].log_softmax(-1) for w in read]
    expected = torch.cat([whole_divergence(p, q) for p, q in zip(before, after, strict=True)])
    assert judge(model, read, base=kept).kl == pytest.approx(float(expected.mean()), rel=1e-4)


def test_the_mode_is_put_back(loaded, tmp_path):
    model, tokenizer = loaded
    model.train()
    judge(model, windows(ForgettingSpec(max_tokens=9), tokenizer, model))
    assert model.training


def test_the_shipped_text_is_long_enough_and_plain():
    text = general_text()
    assert len(text) > 30_000
    assert text.isascii()
    assert "<" not in text
    assert forgetting.KEPT == 1024


def test_many_chunks_say_what_one_says(loaded, monkeypatch):
    model, _ = loaded
    ids = [torch.arange(3, 12)]
    whole = judge(model, ids)
    monkeypatch.setattr("sft.evaluation.log_probs.chunk_rows", lambda _: 2)
    assert judge(model, ids).loss == pytest.approx(whole.loss, rel=1e-6)
