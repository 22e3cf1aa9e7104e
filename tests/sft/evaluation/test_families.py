"""Metrics of whole models: classifiers, taggers, judges of replies, answers to questions."""

from __future__ import annotations

import datasets
import pytest
import torch

from sft.errors import UserError
from sft.evaluation import (
    classification,
    language,
    multiple_choice,
    preference,
    token_classification,
)
from sft.evaluation.spec import EvaluationSpec

TEXTS = ["one two three", "four", "five six", "seven zero one two"]


def spec(*metrics: str, size: int = 2) -> EvaluationSpec:
    return EvaluationSpec(metrics=list(metrics), batch_size=size)


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def built(kind: str, tiny_model, **config):
    import transformers

    torch.manual_seed(0)
    settings = transformers.AutoConfig.from_pretrained(tiny_model, **config)
    return getattr(transformers, kind)(settings).eval()


def test_a_classifier_is_right_where_its_largest_logit_is(tiny_model, tokenizer):
    names = {"label2id": {"a": 0, "b": 1, "c": 2}, "id2label": {0: "a", 1: "b", 2: "c"}}
    model = built("LlamaForSequenceClassification", tiny_model, **names)
    with torch.no_grad():
        alone = [int(model(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in TEXTS]
    given = ("classification", spec("accuracy", "f1"), 99)
    for labels in (alone, ["abc"[k] for k in alone]):
        rows = datasets.Dataset.from_dict({"text": TEXTS, "label": labels})
        found = classification.measure(model, tokenizer, rows, *given)
        assert found["accuracy"] == 1.0
    wrong = [(alone[0] + 1) % 3, *alone[1:]]
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": wrong})
    assert classification.measure(model, tokenizer, rows, *given)["accuracy"] == 0.75
    assert not model.training


def test_pairs_of_texts_are_read_together(tiny_model, tokenizer):
    rows = datasets.Dataset.from_dict({"text": TEXTS, "text_pair": TEXTS[::-1], "label": [0] * 4})
    (batch,) = classification.batches(tokenizer, rows, "classification", 4, 99)
    assert batch["input_ids"].shape[1] == max(
        len(f"{r['text']} {r['text_pair']}".split()) for r in rows
    )


def test_a_class_that_the_model_has_not_is_named(tiny_model, tokenizer):
    model = built("LlamaForSequenceClassification", tiny_model, num_labels=2)
    rows = datasets.Dataset.from_dict({"text": ["one"], "label": [2]})
    with pytest.raises(UserError, match="label: got 2, allowed is one of 2 classes"):
        classification.measure(model, tokenizer, rows, "classification", spec("accuracy"), 99)


def test_images_are_classified():
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16}
    model = ViTForImageClassification(
        ViTConfig(**size, num_hidden_layers=1, num_attention_heads=2, num_labels=2)
    ).eval()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    images = [Image.new("RGB", (9, 9), color) for color in ("red", "blue", "black")]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 0, 0]})
    given = (model, processor, rows, "image_classification", spec("accuracy"), 0)
    classes = classification.predict(
        model, classification.batches(processor, rows, "image_classification", 3, 0)
    )
    assert classification.measure(*given)["accuracy"] == pytest.approx(classes.count(0) / 3)


def test_a_word_has_the_tag_of_its_first_token(tokenizer, tiny_model):
    names = {0: "O", 1: "B-X", 2: "I-X"}
    model = built("LlamaForTokenClassification", tiny_model, id2label=names)
    words = [["one", "two three", "four"], ["five"]]
    rows = datasets.Dataset.from_dict({"tokens": words, "tags": [[0, 0, 0], [0]]})
    with torch.no_grad():
        ids = torch.tensor([tokenizer("one two three four")["input_ids"]])
        tags = [names[int(k)] for k in model(input_ids=ids).logits[0].argmax(-1)]
    found = token_classification.predict(model, tokenizer, rows, 2, 99)
    assert found[0] == [tags[0], tags[1], tags[3]]
    right = sum(tag == "O" for row in found for tag in row) / 4
    given = (model, tokenizer, rows, "token_classification")
    assert token_classification.measure(*given, spec("token_accuracy"), 99) == {
        "token_accuracy": pytest.approx(right)
    }
    assert set(token_classification.measure(*given, spec("token_f1"), 2)) == {"token_f1"}  # cut


def test_rewards_are_the_scores_of_whole_replies(tiny_model, tokenizer):
    model = built("LlamaForSequenceClassification", tiny_model, num_labels=1)
    rows = datasets.Dataset.from_dict(
        {
            "prompt": ["one ->", "two ->"],
            "chosen": [" two", " three"],
            "rejected": [" six", " one two"],
        }
    )

    def score(text):
        with torch.no_grad():
            return float(model(**tokenizer(f"{text}<end>", return_tensors="pt")).logits)

    gaps = [score(r["prompt"] + r["chosen"]) - score(r["prompt"] + r["rejected"]) for r in rows]
    found = preference.measure_rewards(
        model, tokenizer, rows, "preference", spec("reward_margin", "reward_accuracy"), 99
    )
    assert found["reward_margin"] == pytest.approx(sum(gaps) / 2, abs=1e-6)
    assert found["reward_accuracy"] == sum(gap > 0 for gap in gaps) / 2


def test_equal_rewards_are_half_right():
    found = preference.reward_metrics([1.0, 2.0, 0.0], [1.0, 1.0, 3.0], preference.NAMES)
    assert found == {"reward_accuracy": 0.5, "reward_margin": pytest.approx(-2 / 3)}


def test_implicit_rewards_are_those_of_the_adapter(llama, tiny_model, tokenizer):
    import peft

    model = built("LlamaForCausalLM", tiny_model)
    rows = datasets.Dataset.from_dict(
        {"prompt": ["one ->", "two ->"], "chosen": [" two", " three"], "rejected": [" six", " one"]}
    )
    both = spec("reward_accuracy", "reward_margin")
    given = (tokenizer, rows, "preference", both, 99)
    base = preference.reply_log_probs(model, tokenizer, rows, both, 99)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    same = preference.measure_policy(adapted, *given)
    assert same == {"reward_accuracy": 0.5, "reward_margin": 0.0}
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned = preference.reply_log_probs(adapted, tokenizer, rows, both, 99)
    gaps = [0.5 * ((tuned[0][i] - base[0][i]) - (tuned[1][i] - base[1][i])) for i in range(2)]
    found = preference.measure_policy(adapted, *given, beta=0.5)
    assert found["reward_margin"] == pytest.approx(sum(gaps) / 2, abs=1e-5)
    assert preference.measure_policy(adapted, *given, beta=0.5, reference=base) == found


def test_messages_are_judged_by_their_last_reply(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    row = {
        "prompt": [{"role": "user", "content": "one two"}],
        "chosen": [{"role": "assistant", "content": "three four"}],
    }
    found = preference.encode_reply(row, "chosen", tokenizer, 99)
    assert tokenizer.decode(found.completion) == "three four"


@pytest.fixture
def questions():
    return datasets.Dataset.from_dict(
        {
            "question": ["one two", "three", "four ->"],
            "choices": [["three", "four five six"], ["one", "two", "six zero"], ["five", "six"]],
            "answer": ["B", "0", "six"],
        }
    )


def test_choices_are_scored_by_the_sum_of_their_tokens(tiny_model, tokenizer, questions):
    model = built("LlamaForCausalLM", tiny_model)
    found = multiple_choice.scores(model, tokenizer, questions, 2, 99)
    for row, scores in zip(questions, found, strict=True):
        for choice, score in zip(row["choices"], scores, strict=True):
            prompt = tokenizer(row["question"], return_tensors="pt")["input_ids"]
            whole = tokenizer(f"{row['question']} {choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                said = model(whole).logits[0].log_softmax(-1)
            expected = sum(
                float(said[i - 1, whole[0, i]]) for i in range(prompt.shape[1], whole.shape[1])
            )
            assert score == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_choice_is_the_answer(tiny_model, tokenizer, questions, monkeypatch):
    model = built("LlamaForCausalLM", tiny_model)
    scores = [[-9.0, -10.0], [-3.0, -9.0, -2.0], [-4.0, -2.9]]
    monkeypatch.setattr(multiple_choice, "scores", lambda *_: scores)
    both = spec("choice_accuracy", "choice_accuracy_norm")
    found = multiple_choice.measure(model, tokenizer, questions, "multiple_choice", both, 99)
    # by bytes: -9/5 < -10/13; -3/3 < -2/8; -4/4 < -2.9/3
    expected = {"choice_accuracy": 1 / 3, "choice_accuracy_norm": 2 / 3}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("answer", [3, -1, "D", "seven"], ids=str)
def test_an_answer_that_is_no_choice_is_named(answer):
    row = {"question": "one", "choices": ["a", "b", "c"], "answer": answer}
    with pytest.raises(UserError, match=r"answer: got .* in example 5, allowed is 0 to 2"):
        multiple_choice.answer_of(row, 4)


@pytest.mark.parametrize(
    ("format", "metric", "allowed"),
    [("multiple_choice", "nll", "choice_accuracy"), ("text", "choice_accuracy", "nll, perplexity")],
)
def test_data_that_cannot_tell_a_metric_is_named(tokenizer, questions, format, metric, allowed):
    with pytest.raises(UserError, match=f"got {metric} of {format} examples, allowed is {allowed}"):
        language.measure(None, tokenizer, questions, format, spec(metric), 99)


def test_a_word_without_a_token_keeps_the_others_in_place():
    names = {0: "O", 1: "B-X"}
    found = token_classification._by_word([1, 1, 0, 1], [None, 0, 2, 2], names)
    assert found == ["B-X", "O", "O"]  # the second word has no token
    assert token_classification._by_word([1], [None], names) == []


def test_lengths_of_choices_are_counted_in_bytes(tokenizer, monkeypatch):
    rows = [{"question": "one", "choices": ["éé", "aaa"], "answer": 0}]
    monkeypatch.setattr(multiple_choice, "scores", lambda *_: [[-3.2, -2.7]])
    # -3.2 / 4 bytes beats -2.7 / 3; of characters, -3.2 / 2 would not
    given = (None, tokenizer, rows, "multiple_choice")
    assert multiple_choice.measure(*given, spec(*multiple_choice.NAMES), 9) == {
        "choice_accuracy": 0.0,
        "choice_accuracy_norm": 1.0,
    }
