from __future__ import annotations

import random

import pytest
import torch

from sft.data.encode import Encoded, encode
from sft.errors import UserError
from sft.evaluation.completions import (
    edit_distance,
    end_tokens,
    exact_match,
    greedy,
    token_error_rate,
)
from sft.evaluation.likelihood import completion_nll, perplexity
from sft.evaluation.metrics import evaluate


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[1:], b) + 1,
        slow_distance(a, b[1:]) + 1,
        slow_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_edit_distance_agrees_with_its_definition(seed):
    draw = random.Random(seed)
    a = [draw.choice("xyz") for _ in range(draw.randrange(6))]
    b = [draw.choice("xyz") for _ in range(draw.randrange(6))]
    assert edit_distance(a, b) == slow_distance(a, b) == edit_distance(b, a)


def test_error_rates_on_cases_done_by_hand():
    assert token_error_rate(["K AE T", "D AO"], [" K AE T", " D AO G"]) == pytest.approx(1 / 6)
    assert token_error_rate(["a b c d"], ["x"]) == 4
    assert token_error_rate([""], ["x y"]) == 1
    assert exact_match([" K AE  T", "D"], ["K AE T", "D AO"]) == 0.5


@pytest.fixture
def loaded(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    return model, AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def examples(loaded):
    texts = ["one two three", "one", "four five", "six seven one two", "zero zero"]
    return [
        encode(
            {"prompt": f"{text} ->", "completion": " two one"}, "prompt_completion", loaded[1], 99
        )
        for text in texts
    ]


def test_the_completion_ends_with_the_end_of_text(loaded):
    tokenizer = loaded[1]
    found = encode({"prompt": "one ->", "completion": " two"}, "prompt_completion", tokenizer, 99)
    assert tokenizer.decode(found.prompt) == "one ->"
    assert found.completion == tokenizer("two <end>")["input_ids"]
    whole = encode({"text": "one two"}, "text", tokenizer, 2)
    assert (whole.prompt, len(whole.completion)) == ([], 2)


def test_nll_is_the_mean_over_completion_tokens_one_example_at_a_time(loaded, examples):
    model, tokenizer = loaded
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.prompt + example.completion])
        log_probs = model(ids).logits.log_softmax(-1)[0]
        for position in range(len(example.prompt), ids.shape[1]):
            total -= log_probs[position - 1, ids[0, position]].item()
            count += 1
    for batch_size in (1, 2, 5):
        found = completion_nll(model, examples, batch_size, tokenizer.pad_token_id)
        assert found == pytest.approx(total / count, rel=1e-5)


def test_greedy_completions_do_not_depend_on_the_batch(loaded, examples):
    model, tokenizer = loaded
    alone = [greedy(model, tokenizer, [example], 5, 1)[0] for example in examples]
    assert greedy(model, tokenizer, examples, 5, 2) == alone
    assert greedy(model, tokenizer, examples, 5, 5) == alone


def test_evaluate_gives_what_was_asked_for_and_restores_the_mode(loaded, examples):
    model, tokenizer = loaded
    model.train()
    found = evaluate(
        model, tokenizer, examples, ["exact_match", "nll"], max_new_tokens=3, batch_size=2
    )
    assert list(found) == ["exact_match", "nll"]
    assert model.training


def test_an_example_cut_to_its_prompt_counts_nothing(loaded):
    cut = Encoded([3, 4, 5], [], "x")
    assert completion_nll(loaded[0], [cut], 1, 0) == 0.0


def test_perplexity_counts_equally_likely_tokens(loaded, examples):
    model, tokenizer = loaded
    found = evaluate(
        model, tokenizer, examples, ["perplexity", "nll"], max_new_tokens=1, batch_size=4
    )
    assert perplexity(torch.tensor(7.0).log().item()) == pytest.approx(7, rel=1e-6)
    assert found["perplexity"] == pytest.approx(2.718281828 ** found["nll"])


def test_text_without_prompts_is_not_completed(loaded):
    model, tokenizer = loaded
    text = [encode({"text": "one two"}, "text", tokenizer, 9)]
    with pytest.raises(UserError, match="got exact_match of examples without a prompt"):
        evaluate(model, tokenizer, text, ["nll", "exact_match"], max_new_tokens=1, batch_size=1)


def test_a_model_s_own_ends_of_text_end_a_completion(loaded, examples):
    model, tokenizer = loaded
    before = greedy(model, tokenizer, examples[:1], 5, 1)[0].split()
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    first = tokenizer.convert_tokens_to_ids(before[0])
    model.generation_config.eos_token_id = [first, tokenizer.eos_token_id]
    assert len(before) > 1
    assert greedy(model, tokenizer, examples[:1], 5, 1)[0].split() == before[:1]
