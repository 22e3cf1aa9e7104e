"""What does not go together is refused in one line, before anything trains."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

from sft.errors import UserError


def examples(**row):
    from datasets import Dataset

    from sft.data.load import Examples

    return Examples(Dataset.from_list([row]), None, "messages")


@pytest.mark.parametrize("key", ["messages", "prompt", "chosen"])
def test_conversations_need_a_template(key, word_tokenizer):
    from sft.data.chat_template import check_template

    chats, texts = examples(**{key: [{"role": "user", "content": "x"}]}), examples(**{key: "x"})
    with pytest.raises(UserError, match=f"^model.chat_template: m brings none, and '{key}' of"):
        check_template(chats, word_tokenizer, "m")
    check_template(texts, word_tokenizer, "m")
    check_template(chats, types.SimpleNamespace(), "m")  # it reads images
    templated = types.SimpleNamespace(chat_template="x", apply_chat_template=None)
    check_template(chats, templated, "m")


def test_an_encoder_writes_nothing(models):
    from transformers import AutoConfig, BartForCausalLM

    from sft.tasks.base import check_decoder

    with pytest.raises(UserError, match=r"^model.name: m is an encoder \(bert\)"):
        check_decoder(AutoConfig.from_pretrained(models("bert")), "m")
    check_decoder(AutoConfig.from_pretrained(models("bert"), is_decoder=True), "m")
    check_decoder(AutoConfig.from_pretrained(models("llama")), "m")
    check_decoder(BartForCausalLM.from_pretrained(models("bart")).config, "m")


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_images_open(tmp_path, kind):
    from PIL import Image

    from sft.data.load import load_data
    from sft.data.spec import DataSpec

    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    if kind == "broken":
        (tmp_path / "b.png").write_bytes(b"no image")
    else:
        (tmp_path / "b.png").unlink()
    table = tmp_path / "rows.csv"
    table.write_text("image,label\na.png,x\nb.png,y\nc.png,y\n")
    reason = "no such file" if kind == "missing" else "is no image"
    with pytest.raises(UserError, match=rf"rows.csv:3: image: .*b.png: {reason}"):
        load_data(DataSpec(train=str(table)), 0, ("image_classification",))
    skipping = DataSpec(train=str(table), on_bad_row="skip")
    assert len(load_data(skipping, 0, ("image_classification",)).train) == 2


def test_images_without_pillow_name_the_extra(tmp_path, monkeypatch):
    import importlib.util

    from PIL import Image

    from sft.data.load import load_data
    from sft.data.spec import DataSpec

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    table = tmp_path / "rows.csv"
    table.write_text("image,label\na.png,x\n")
    there = importlib.util.find_spec

    def missing(name, *given):
        return None if name == "PIL" else there(name, *given)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(UserError) as caught:
        load_data(DataSpec(train=str(table)), 0, ("image_classification",))
    (extra,) = re.findall(r"data.train: .* pip install \"sparse-sft\[(\w+)\]", str(caught.value))
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'\n{extra} = ["pillow' in pyproject


def test_a_mistake_of_the_user_is_said_once(recipe_of, monkeypatch):
    from sft.run.job import train_from_recipe

    def refuse(*_):
        raise UserError("task.rewards: wrong")

    monkeypatch.setattr("sft.tasks.grpo.reward_functions", refuse)
    with pytest.raises(UserError, match=r"^task.rewards: wrong$"):
        train_from_recipe(recipe_of("grpo"))


def test_what_writes_nothing_does_not_chat(models):
    from typer.testing import CliRunner

    from sft.cli import app

    found = CliRunner().invoke(app, ["chat", str(models("vit")), "--once", "x"])
    assert found.exit_code == 2
    assert "is a model for image-classification, which writes no text" in found.output


@pytest.fixture
def recipe_of(tmp_path, models, rows_file):
    def build(task):
        import yaml

        from sft.recipe.load import load_recipe

        path = tmp_path / "recipe.yaml"
        content = {
            "model": {"name": str(models("llama"))},
            "task": {"name": task, "rewards": ["exact_match"]},
            "method": {"name": "spiel", "density": 0.05},
            "data": {"train": str(rows_file(task))},
            "forgetting": False,
            "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True},
        }
        path.write_text(yaml.safe_dump(content))
        return load_recipe(path)

    return build
