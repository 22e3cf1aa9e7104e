"""Rewards: their values, how a recipe names them, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sft.errors import UserError
from sft.rewards import builtin
from sft.rewards.find import RewardSpec, reward_functions


def call(spec, completions, reference=None, **columns):
    [(function, weight)] = reward_functions([RewardSpec.model_validate(spec)], reference)
    assert weight == spec.get("weight", 1.0)
    return function(prompts=["p"] * len(completions), completions=completions, **columns)


def test_values():
    assert builtin.exact_match(" K  AE T\n", "K AE T") == 1.0
    assert builtin.exact_match("K AE", "K AE T") == 0.0
    assert builtin.token_error_rate("K AE", "K AE T") == pytest.approx(-1 / 3)
    assert builtin.token_error_rate("a b c d e f g", "K AE T") == -1.0
    assert builtin.length("one two three", target=4) == -0.25
    assert builtin.length("", target=4) == builtin.length("a " * 99, target=4) == -1.0
    assert builtin.pattern_match("<a>\n</a>\n", "<a>.*</a>") == 1.0
    assert builtin.pattern_match("x <a></a>", "<a>.*</a>") == 0.0


def test_the_right_answer_is_found_in_texts_and_conversations():
    chat = [[{"role": "assistant", "content": "two"}], [{"role": "assistant", "content": "one"}]]
    assert call({"name": "exact_match"}, ["one", "two"], answer=["one", "one"]) == [1.0, 0.0]
    assert call({"name": "exact_match", "weight": 2.0}, chat, completion=chat[::-1]) == [0.0, 0.0]
    assert call({"name": "exact_match"}, ["b"], "gold", gold=["b"], answer=["a"]) == [1.0]


def test_without_a_right_answer_the_columns_are_named():
    with pytest.raises(UserError, match=r"task\.reference: found no column completion or answer"):
        call({"name": "exact_match"}, ["one"], topic=["x"])


def test_a_function_of_a_users_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def brief(completions, **_):\n    return [-len(c) for c in completions]\n")
    assert call({"name": f"{path}:brief"}, ["ab", "c"]) == [-2, -1]
    with pytest.raises(UserError, match=r"has no function 'long'"):
        call({"name": f"{path}:long"}, ["ab"])
    with pytest.raises(UserError, match=r"no such file .*gone\.py"):
        call({"name": f"{tmp_path}/gone.py:brief"}, ["ab"])
    path.write_text("import nothing_like_it\n")
    with pytest.raises(UserError, match=r"mine\.py: ModuleNotFoundError"):
        call({"name": f"{path}:brief"}, ["ab"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "exactmatch"}, "did you mean 'exact_match'"),
        ({"name": "length"}, "needs 'target'"),
        ({"name": "exact_match", "pattern": "x"}, "has no 'pattern'"),
        ({"name": "format", "pattern": "("}, "no regular expression"),
    ],
    ids=["unknown", "lacking", "foreign", "pattern"],
)
def test_a_recipe_is_told_what_is_wrong(spec, message):
    with pytest.raises(ValidationError, match=message):
        RewardSpec.model_validate(spec)


def test_measured_reward_is_the_weighted_sum():
    from sft.evaluation.rewarded import total_reward

    rewards = reward_functions(
        [RewardSpec(name="exact_match"), RewardSpec(name="length", target=2, weight=0.5)], None
    )
    columns = {"prompt": ["p", "q"], "answer": ["one", "two"]}
    assert total_reward(["one", "six"], columns, rewards) == pytest.approx(0.5 - 0.25)


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("raise KeyError('x')", r"KeyError: .*rewards.py:2\); mend"),
        ("return ['a']", "got 'a' for a completion, allowed is a number or None; mend"),
        ("return None", "TypeError: 'NoneType' object is not iterable"),
    ],
    ids=["raises", "text", "nothing"],
)
def test_a_users_function_fails_in_one_line(tmp_path, body, wrong):
    path = tmp_path / "rewards.py"
    path.write_text(f"def mine(completions, **columns):\n    {body}\n")
    name = f"{path}:mine"
    ((function, _),) = reward_functions([RewardSpec(name=name)], None)
    assert function.__name__ == "mine"
    with pytest.raises(UserError, match=f"^task.rewards: {name}: {wrong}") as caught:
        function(completions=["a"])
    assert "\n" not in str(caught.value)


def test_the_whole_completion_fits_a_pattern():
    assert builtin.pattern_match("ab", "ab") == 1.0
    assert builtin.pattern_match("abc", "ab") == builtin.pattern_match("cab", "ab") == 0.0


def test_of_a_long_conversation_the_end_is_kept():
    from sft.evaluation.rewarded import encode_prompts

    class Tokenizer:
        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

        def __call__(self, text, **_):
            return {"input_ids": [int(c) for c in text]}

    rows = [{"prompt": [{"role": "user", "content": "12345"}]}]
    (found,) = encode_prompts(rows, Tokenizer(), 2)
    assert found.prompt == [4, 5]
