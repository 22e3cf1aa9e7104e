from __future__ import annotations

import pytest
import torch

from sft.evaluation.log_probs import log_probs, predicts_tokens, token_log_probs


def inputs_of(vocabulary: int = 48) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, vocabulary, (3, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("rows", [1, 4, None])
def test_chunks_are_the_model_s_own_log_probabilities(llama, rows):
    model, inputs = llama(), inputs_of()
    wanted = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    found = list(log_probs(model, inputs, wanted, rows))
    with torch.no_grad():
        expected = model(**inputs).logits.log_softmax(-1)[wanted]
    assert rows is None or max(len(chunk) for chunk in found) == rows
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_changes_its_logits_is_asked_for_them(llama):
    model, inputs = llama(), inputs_of()
    plain = type(model).forward

    class Twice(type(model)):
        def forward(self, *args, **kwargs):
            out = plain(self, *args, **kwargs)
            out.logits = out.logits * 2
            return out

    model.__class__ = Twice
    wanted = torch.ones(3, 7, dtype=torch.bool)
    with torch.no_grad():
        expected = model(**inputs).logits.log_softmax(-1)[wanted]
    torch.testing.assert_close(torch.cat(list(log_probs(model, inputs, wanted))), expected)


def test_whole_logits_are_never_made(llama, monkeypatch):
    model, inputs = llama(vocab_size=512), inputs_of()
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.numel() // 512))
    list(log_probs(model, inputs, torch.ones(3, 7, dtype=torch.bool), rows=2))
    assert max(seen) == 3  # a position of each row, to compare; then 2 at a time


def test_log_probs_of_labels_lie_where_the_labels_are(llama):
    model, inputs = llama(), inputs_of()
    labels = inputs["input_ids"].masked_fill(torch.arange(7) % 3 == 0, -100)
    found = token_log_probs(model, inputs, labels)
    with torch.no_grad():
        whole = model(**inputs).logits.log_softmax(-1)
    for row in range(3):
        for column in range(7):
            label = int(labels[row, column])
            value = 0.0 if label == -100 else float(whole[row, column - 1, label])
            assert float(found[row, column]) == pytest.approx(value, abs=1e-5)


def test_nothing_to_predict_is_zero(llama):
    inputs = inputs_of()
    labels = torch.full_like(inputs["input_ids"], -100)
    assert not token_log_probs(llama(), inputs, labels).any()


def test_a_prompt_before_the_inputs_does_not_move_positions(llama):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, inputs = peft.get_peft_model(llama(), config).eval(), inputs_of()
    wanted = torch.ones(3, 7, dtype=torch.bool)
    with torch.no_grad():
        expected = model(**inputs).logits[:, 4:].log_softmax(-1)[wanted]
    found = torch.cat(list(log_probs(model, inputs, wanted)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_classifiers_and_masked_models_predict_no_next_token(llama):
    from transformers import BertConfig, BertForMaskedLM, LlamaForSequenceClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert predicts_tokens(llama())
    assert not predicts_tokens(LlamaForSequenceClassification(llama().config))
    assert not predicts_tokens(BertForMaskedLM(BertConfig(**small, intermediate_size=16)))


def test_token_0_is_a_label_too(llama):
    inputs = inputs_of()
    labels = torch.zeros_like(inputs["input_ids"])
    found = token_log_probs(llama().eval(), inputs, labels)
    assert bool((found[:, 1:] < 0).all())
