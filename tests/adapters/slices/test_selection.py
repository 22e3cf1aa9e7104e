"""Which units are chosen: hand-built layers whose best units are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sft.adapters.ranks import ALONE
from sft.adapters.slices.budget import Quota
from sft.adapters.slices.calibration import UnitCalibration
from sft.adapters.slices.selection import Choice, choose_units, rank, unit_scores, weight_scores
from sft.adapters.slices.units import Slot, UnitGroup


def group(name="ffn", units=6, size=1, slots=("down",), shared=None):
    table = torch.arange(units * size).view(units, size)
    made = []
    for role in slots:
        rep = (shared or {}).get(role, 1)
        own = torch.arange(units // rep * size).view(-1, size)
        made.append(Slot(role, f"{name}.{role}", "in", own, 4, rep))
    return UnitGroup(name, "channels", f"{name}.down", table, tuple(made))


def chosen(groups, counts, **choice):
    quotas = [Quota((slot,), counts[slot.role]) for g in groups for slot in g.slots]
    return choose_units(groups, quotas, Choice(0, **choice))


SCORES = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0, 4.0])


@pytest.mark.parametrize("largest, expected", [(True, [0, 4, 5]), (False, [1, 2, 3])])
def test_s2ft_fact18_top_and_bottom_units(largest, expected) -> None:
    found = chosen([group()], {"down": 3}, scores={"ffn": SCORES}, largest=largest)
    assert found["ffn.down"]["down"].tolist() == expected


def test_s2ft_fact18_ties_go_to_the_lower_index() -> None:
    assert rank(SCORES, largest=False).tolist() == [1, 3, 2, 0, 5, 4]
    assert rank(torch.ones(50), largest=True).tolist() == list(range(50))


def test_s2ft_fact18_a_heads_score_is_the_mean_of_its_channels() -> None:
    found = unit_scores(torch.tensor([1.0, 3, 0, 0, 5, 7]), group(units=3, size=2).table)
    assert found.tolist() == [2, 0, 6]


def test_s2ft_fact18_random_depends_on_the_seed_and_the_group_alone() -> None:
    one = chosen([group()], {"down": 3})["ffn.down"]["down"]
    torch.manual_seed(5)
    assert torch.equal(one, chosen([group()], {"down": 3})["ffn.down"]["down"])
    drawn = {
        tuple(choose_units([g], [Quota(g.slots, 3)], Choice(seed))[f"{name}.down"]["down"].tolist())
        for seed in range(3)
        for name in ("a", "b", "c")
        for g in [group(name)]
    }
    assert len(drawn) > 4


def test_matrices_of_a_group_train_the_same_units_as_far_as_they_go() -> None:
    found = chosen([group(slots=("up", "down"))], {"up": 2, "down": 4})
    up, down = found["ffn.up"]["up"].tolist(), found["ffn.down"]["down"].tolist()
    assert len(up) == 2 and len(down) == 4 and set(up) < set(down)


def test_shared_units_stand_where_they_are_first_named() -> None:
    groups = [group(slots=("k", "down"), shared={"k": 2})]  # k has 3 units, two heads each
    scores = {"ffn": torch.tensor([0.0, 9, 5, 6, 7, 1])}
    found = chosen(groups, {"k": 2, "down": 2}, scores=scores)
    assert found["ffn.down"]["down"].tolist() == [1, 4]
    assert found["ffn.k"]["k"].tolist() == [0, 2]


def test_a_pool_takes_the_best_of_all_layers() -> None:
    groups = [group("a"), group("b")]
    pool = Quota(tuple(slot for g in groups for slot in g.slots), 5)
    scores = {"a": SCORES, "b": SCORES + 2}
    found = choose_units(groups, [pool], Choice(0, scores=scores))
    assert found["a.down"]["down"].tolist() == [4, 5]
    assert found["b.down"]["down"].tolist() == [0, 4, 5]
    random = choose_units(groups, [pool], Choice(0))
    assert sum(len(units["down"]) for units in random.values()) == 5


def test_s2ft_fact15_excluded_units_are_left_out() -> None:
    taken = {"ffn.down": torch.tensor([4, 5], dtype=torch.int32)}
    found = chosen([group()], {"down": 3}, scores={"ffn": SCORES}, excluded=taken)
    assert found["ffn.down"]["down"].tolist() == [0, 1, 2]
    whole = chosen([group(units=3, size=2)], {"down": 2}, excluded=taken)
    assert whole["ffn.down"]["down"].tolist() == [0, 1], "a unit is out with any of its features"
    with pytest.raises(ValueError, match=r"^exclude: leaves 4 of 6 units of 'ffn.down'"):
        chosen([group()], {"down": 5}, excluded=taken)


def test_weight_scores_are_column_norms() -> None:
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    found = weight_scores([group()], {"ffn.down": weight}.__getitem__)["ffn"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, weight.float().norm(dim=0))


# -- scores by batches -----------------------------------------------------------------------


class Toy(nn.Module):
    """h = x, y = D h, loss = sum of c * y."""

    def __init__(self, weight):
        super().__init__()
        self.down = nn.Linear(*weight.shape[::-1], bias=False)
        self.down.weight.data = weight

    def forward(self, x, c=None, attention_mask=None):
        y = self.down(x)
        return None if c is None else (y * c).sum()


@pytest.fixture
def weight():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    return [
        {
            "x": torch.randn(2, 5, 6, generator=generator),
            "c": torch.randn(2, 5, 4, generator=generator),
            "attention_mask": mask,
        }
        for _ in range(3)
    ]


def calibrate(selection, weight, batches, dtype=torch.float32, ranks=ALONE):
    found, reads = {}, []
    model = Toy(weight.to(dtype))
    model.down.requires_grad_(False)
    one = UnitGroup("ffn", "channels", "down", torch.arange(6)[:, None], ())

    def read(name):
        reads.append(ranks.gather([ranks.rank]))  # as where every rank holds a part of it
        return model.down.weight

    calibration = UnitCalibration(model, [one], selection, None, read, found.update)
    calibration.ranks = ranks
    calibration.open()
    for batch in batches:
        calibration.before_batch(batch)
        x, c = batch["x"].to(dtype), batch["c"].to(dtype)
        loss = model(x, c if calibration.backward else None)
        if loss is not None:
            loss.backward()
    calibration.close()
    assert not model.down._forward_hooks
    calibration.choose(len(batches))
    assert len(reads) == (selection == "product")
    return found["ffn"]


def expected(selection, weight, batches):
    masks = [batch["attention_mask"].bool() for batch in batches]
    kept = [(b["x"][mask], b["c"][mask]) for b, mask in zip(batches, masks, strict=True)]
    h = torch.cat([x for x, _ in kept])
    if selection == "activation":
        return h.abs().mean(0)
    if selection == "product":
        return weight.norm(dim=0) * h.square().mean(0).sqrt()
    return sum((c.t() @ x).square().sum(0) for x, c in kept).sqrt()


@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_s2ft_fact18_scores_by_batches_ignore_padding(selection, weight, batches) -> None:
    found = calibrate(selection, weight, batches)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(selection, weight, batches))
    for batch in batches:
        batch["x"] = batch["x"].masked_fill(batch["attention_mask"][..., None] == 0, 1e6)
    assert torch.equal(calibrate(selection, weight, batches), found), "padding leaves no trace"
    unmasked = [{**batch, "attention_mask": torch.ones(2, 5)} for batch in batches]
    assert not torch.equal(calibrate(selection, weight, unmasked), found)


@pytest.mark.parametrize("selection", ["activation", "product"])
def test_ranks_choose_by_all_tokens_though_one_saw_none(
    selection, weight, batches, together
) -> None:
    for shares in ([batches[:1], batches[1:]], [batches, []]):
        found = together(
            lambda ranks, shares=shares: calibrate(
                selection, weight, shares[ranks.rank], ranks=ranks
            )
        )
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], expected(selection, weight, batches))


@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_s2ft_fact18_low_precision_batches_are_summed_in_float32(
    selection, weight, batches
) -> None:
    many = batches * 40
    found = calibrate(selection, weight, many, torch.bfloat16)
    torch.testing.assert_close(found, expected(selection, weight, many), rtol=2e-2, atol=1e-3)


def test_a_module_that_no_batch_reaches_is_named(weight) -> None:
    with pytest.raises(ValueError, match=r"^calibration: 'down' was not reached by 0 batches"):
        calibrate("activation", weight, [])


@pytest.mark.parametrize("available, wanted", [(None, 8), (1, 1), (100, 1), (101, 2), (2000, 20)])
def test_one_percent_of_the_batches_are_read(weight, available, wanted) -> None:
    calibration = UnitCalibration(Toy(weight), [], "activation", None, None, None)
    assert calibration.num_batches(available) == wanted
    assert UnitCalibration(Toy(weight), [], "gradient", 3, None, None).num_batches(available) == 3
