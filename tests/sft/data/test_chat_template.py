"""A recipe's chat template replaces the tokenizer's, and is saved with what is trained."""

from __future__ import annotations

import pytest

from sft.data.chat_template import read_template
from sft.errors import UserError
from sft.models import load_tokenizer
from sft.recipe.load import load_recipe
from sft.recipe.schema import ModelSpec
from sft.run.job import train_from_recipe

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
MARKED = (
    "{% for m in messages %}{%- generation -%}{{ m['content'] }}{% endgeneration %}{% endfor %}"
)


def test_a_template_is_a_file_or_its_text(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(MARKED)
    assert read_template(str(path)) == MARKED
    assert read_template(MARKED) == MARKED


def test_what_is_no_template_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jinja: no such file"):
        read_template(str(tmp_path / "nowhere.jinja"))
    with pytest.raises(UserError, match="chatml: no such file"):
        read_template("chatml")
    with pytest.raises(UserError, match=r"model\.chat_template: line 2: "):
        read_template("{{ messages }}\n{% for m in messages %}")


def test_the_tokenizer_has_it(tiny_model):
    spec = ModelSpec(name=str(tiny_model), chat_template=TEMPLATE)
    chat = [{"role": "user", "content": "one"}]
    assert load_tokenizer(spec).apply_chat_template(chat, tokenize=False) == "one "
    assert load_tokenizer(ModelSpec(name=str(tiny_model))).chat_template is None


def test_it_is_saved_with_adapter_and_merged_model(recipe_file, tmp_path, jsonl):
    from transformers import AutoTokenizer

    roles = ("user", "one two"), ("assistant", "three")
    row = {"messages": [{"role": role, "content": text} for role, text in roles]}
    overrides = [
        f"data.train={jsonl('chat.jsonl', *[row] * 4)}",
        "data.eval_examples=null",
        f'model.chat_template="{TEMPLATE}"',
        "training.max_steps=1",
        "forgetting=false",
    ]
    train_from_recipe(load_recipe(recipe_file, overrides))
    for name in ("adapter", "merged"):
        saved = AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        assert saved.chat_template == TEMPLATE
