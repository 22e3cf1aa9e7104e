"""The parts of a plan: what is noted, where it lies, which batch, which device."""

from __future__ import annotations

import json

import pytest
import torch

from sft.errors import UserError
from sft.plan.batch import batch_of
from sft.plan.devices import GIB, device_of
from sft.plan.flops import flops
from sft.plan.ledger import Ledger
from sft.plan.optimizers import optimizer_maker
from sft.plan.placement import Placement, placement_of
from sft.plan.shapes import faking
from sft.plan.timeline import GRADIENTS, OPTIMIZER, WEIGHTS, Piece, Timeline
from sft.recipe.load import load_recipe


def test_a_ledger_notes_births_deaths_scratch_and_arithmetic():
    ledger = Ledger(lambda func, args: 1000 * (func._opname == "mm"), flops)
    with faking(), ledger:
        left = torch.empty(10, 20)
        right = left.t()  # a view takes nothing
        product = left @ right
        del product
        copy = left.clone()
        ledger.mark(WEIGHTS, [left])
    assert [piece.size for piece in ledger.timeline.pieces] == [800, 400, 800]
    assert [piece.kind for piece in ledger.alive()] == [WEIGHTS, "transients"]
    assert list(ledger.timeline.spikes.values()) == [1000]
    assert sum(work.flops for work in ledger.timeline.work) == 2 * 10 * 20 * 10
    ledger.timeline.phases += [("all", 0), ("", ledger.clock + 1)]
    peak = ledger.timeline.peaks()["all"]
    assert peak == {WEIGHTS: 800, "transients": 400 + 1000}
    assert copy.shape == (10, 20)


def test_sums_of_gradients_take_the_place_of_their_first_part():
    ledger = Ledger(lambda func, args: 0, flops)
    with faking(), ledger:
        total, other = torch.empty(10), torch.empty(10)
        ledger.backward = True
        total = total + other
        ledger.backward = False
        ledger.join_sums()
        ledger.timeline.phases += [("all", 0), ("", ledger.clock + 1)]
        assert sum(ledger.timeline.peaks()["all"].values()) == 2 * 40
    assert total.shape == (10,)


def test_a_peak_moves_when_a_kind_is_shared_out():
    pieces = [
        Piece(100, 0, True, kind=OPTIMIZER),
        Piece(80, 1, True, died=2, kind=GRADIENTS),
        Piece(60, 3, True, died=4),
    ]
    timeline = Timeline(pieces, phases=[("step", 0), ("", 5)])
    assert sum(timeline.peaks()["step"].values()) == 180
    halved = timeline.peaks(lambda kind: 0.25 if kind == GRADIENTS else 1.0)["step"]
    assert halved == {OPTIMIZER: 100, "transients": 60}
    assert timeline.held(OPTIMIZER) == 100
    assert timeline.most(GRADIENTS) == 80


@pytest.mark.parametrize("kind", ["weights", "trained", "gradients", "optimizer", "activations"])
def test_stages_share_out_one_kind_after_another(kind):
    shares = [Placement(4, f"zero{stage}").share(kind) for stage in (1, 2, 3)]
    first = {"optimizer": 1, "gradients": 2, "weights": 3, "trained": 3}.get(kind, 4)
    assert shares == [0.25 if stage >= first else 1.0 for stage in (1, 2, 3)]


def test_offloaded_kinds_leave_the_device():
    placement = Placement(offload=frozenset({"optimizer", "base"}))
    assert placement.share(OPTIMIZER) == placement.share(WEIGHTS) == 0
    assert placement.aside


def test_options_go_over_the_recipes_own_sections(plan_recipe):
    training = {
        **plan_recipe.training,
        "deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    }
    recipe = plan_recipe.model_copy(update={"training": training})
    own = placement_of(recipe, 2, None, False, None)
    assert own == Placement(2, "zero2", frozenset({"optimizer"}))
    assert placement_of(recipe, 2, 3, False, "") == Placement(2, "zero3")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((0, None, False, None), "--world: got 0"),
        ((1, 4, False, None), "--zero: got 4"),
        ((1, 3, True, None), "--fsdp: got --zero as well"),
        ((1, None, False, "disk"), "--offload: got 'disk'"),
    ],
    ids=["world", "zero", "both", "offload"],
)
def test_options_out_of_range_are_refused(plan_recipe, options, said):
    with pytest.raises(UserError, match=said):
        placement_of(plan_recipe, *options)


def test_devices_by_name_and_by_size():
    assert device_of("24GB").memory == 24 * GIB
    assert device_of("24GB").single is None
    sizes = [device_of(name).memory for name in ("t4", "a100-40gb", "h100-80gb")]
    assert sizes == sorted(sizes)
    assert device_of("A100_80GB").half == pytest.approx(156e12)
    with pytest.raises(UserError, match="did you mean 'a100-80gb'"):
        device_of("a100-80g")


def test_the_longest_rows_make_the_batch(plan_recipe, tiny_model, tmp_path):
    rows = [{"prompt": "one two ->", "completion": " three"}] * 8
    rows += [{"prompt": "one two three four ->", "completion": " five six"}] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = plan_recipe.model_copy(
        update={
            "model": plan_recipe.model.model_copy(update={"name": str(tiny_model)}),
            "data": plan_recipe.data.model_copy(update={"train": str(path)}),
        }
    )
    found = batch_of(recipe)
    # five words and two, and the end; five are the longest rows' labels, with each end
    assert (found.rows, found.length, found.labels) == (4, 8, 2 * 3 + 2 * 2)
    assert found.source == "the longest of 10 examples"


def test_without_data_the_length_is_the_recipes(plan_recipe):
    found = batch_of(plan_recipe)
    assert (found.rows, found.length, found.labels) == (4, 48, 4 * 47)
    assert "training.max_length" in found.source
    assert batch_of(plan_recipe, 100).length == 100


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adamw_8bit", "lion_8bit"])
def test_eight_bit_states_take_a_byte_an_entry(plan_file, name) -> None:
    recipe = load_recipe(plan_file, ["method={name: full}", f"training.optim={name}"])
    layer = torch.nn.Linear(256, 256, bias=False)
    optimizer = optimizer_maker(recipe)(layer)
    optimizer.step()
    held = sum(t.nbytes for t in optimizer.state[layer.weight].values())
    assert held == (1 if "lion" in name else 2) * (256 * 256 + 4 * 256)
