"""Whatever is kept of checkpoints, a whole one is there at every moment."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from sft import SparseCallback, ZerothOrderConfig
from sft.checkpoint import check_whole, last_whole_checkpoint
from sft.mark_checkpoints import MarkCheckpoints

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture
def deleted(monkeypatch, lab):
    """The names of checkpoints that were deleted, each while another one was whole."""
    found, remove = [], shutil.rmtree

    def watched(path, *args, **kwargs):
        name = str(path).rpartition("/")[2]
        if name.startswith("checkpoint-"):
            others = [
                one for one in left(lab) if one != name and is_whole(lab.folder / "run" / one)
            ]
            assert others, f"{name} was the only whole one"
            found.append(name)
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    return found


def is_whole(folder):
    try:
        return bool(check_whole(folder))
    except ValueError:
        return False


def left(lab):
    return sorted(path.name for path in (lab.folder / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("kind", ["sparse", "zeroth order", "lora"])
def test_one_is_enough(lab, deleted, kind):
    settings = {}
    if kind == "zeroth order":
        settings = {"trainer": {"zeroth_order": ZerothOrderConfig()}, "growth": "none"}
    elif kind == "lora":
        model = get_peft_model(lab.base(), LoraConfig(r=2, task_type="CAUSAL_LM"))
        settings = {"model": model, "trainer": {"callbacks": [MarkCheckpoints()]}}
    lab.run("run", save_total_limit=1, **SAVES, **settings)
    assert deleted == ["checkpoint-2", "checkpoint-4"]
    assert left(lab) == ["checkpoint-6"]
    assert last_whole_checkpoint(lab.folder / "run").name == "checkpoint-6"


def test_one_that_was_cut_short_takes_no_place_of_the_last_whole_one(lab, deleted):
    """The stock order would delete step 2, as the broken step 3 is newer, before 4 is whole."""
    lab.run("run", save_total_limit=2, save_strategy="steps", save_steps=2, max_steps=2)
    shutil.copytree(lab.folder / "run" / "checkpoint-2", lab.folder / "run" / "checkpoint-3")
    (lab.folder / "run" / "checkpoint-3" / "sft_state.json").unlink()
    lab.run("run", True, save_total_limit=2, save_strategy="steps", save_steps=2, max_steps=4)
    assert deleted == ["checkpoint-2"]
    assert last_whole_checkpoint(lab.folder / "run").name == "checkpoint-4"


def test_the_best_one_stays(lab, deleted):
    lab.run(
        "run", save_total_limit=1, eval_strategy="steps", eval_steps=2, learning_rate=0.0,
        load_best_model_at_end=True, trainer={"eval_dataset": lab.dataset(4)}, **SAVES,
    )  # fmt: skip
    assert deleted == ["checkpoint-4", "checkpoint-6"], "at the end the best alone is kept"
    assert left(lab) == ["checkpoint-2"]


def test_the_arguments_are_saved_as_they_were_given(lab):
    run = lab.run("run", save_total_limit=1, **SAVES)
    assert run.trainer.args.save_total_limit == 1
    path = lab.folder / "run" / "checkpoint-6" / "training_args.bin"
    assert torch.load(path, weights_only=False).save_total_limit == 1


def test_a_stock_trainer_that_would_keep_none_is_refused(lab):
    def train(limit):
        Trainer(
            model=lab.adapted(), args=lab.arguments("run", save_total_limit=limit, **SAVES),
            train_dataset=lab.dataset(), callbacks=[SparseCallback()],
        ).train()  # fmt: skip

    with pytest.raises(ValueError, match=r"^save_total_limit: got 1 under a stock Trainer, "):
        train(1)
    train(2)
    assert left(lab) == ["checkpoint-4", "checkpoint-6"]
