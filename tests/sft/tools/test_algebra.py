"""Ways to combine changes, by hand and against PEFT's own on dense tensors."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

from sft.errors import UserError
from sft.tools.algebra import OPERATIONS, Request, check_request, combine
from sft.tools.aligned import align
from sft.tools.change import Change

SHAPE = (2, 4)


def sparse(indices: list[int], values: list[float]) -> Change:
    return Change(SHAPE, torch.tensor(values), torch.tensor(indices), len(values))


FIRST = sparse([0, 2, 5], [1.0, -2.0, 3.0])
SECOND = sparse([2, 5, 7], [4.0, 1.0, -6.0])


def combined(operation: str, *changes: Change, weights=None, **settings) -> dict[int, float]:
    """Values by position."""
    request = Request(operation, weights or (1.0,) * len(changes), **settings)
    check_request(request, len(changes))
    aligned = align(SHAPE, changes)
    values, where = combine(aligned, request, torch.Generator().manual_seed(request.seed))
    positions = torch.arange(8) if aligned.positions is None else aligned.positions
    return dict(zip(positions[where].tolist(), values[where].tolist(), strict=True))


@pytest.mark.parametrize(
    ("operation", "settings", "wanted"),
    [
        ("add", {}, {0: 1, 2: 2, 5: 4, 7: -6}),
        ("add", {"weights": (1, 0.5)}, {0: 1, 2: 0, 5: 3.5, 7: -3}),
        ("subtract", {}, {0: 1, 2: -6, 5: 2, 7: 6}),
        ("subtract", {"weights": (2, 0.5)}, {0: 2, 2: -6, 5: 5.5, 7: 3}),
        ("union", {}, {0: 1, 2: 1, 5: 2, 7: -6}),
        ("intersect", {}, {2: 1, 5: 2}),
        ("ties", {"density": 1.0}, {0: 1, 2: 4, 5: 2, 7: -6}),
        ("ties", {"density": 2 / 3}, {2: 4, 5: 3, 7: -6}),
        ("ties", {"density": 1.0, "weights": (1, -1)}, {0: 1, 2: -3, 5: 3, 7: 6}),
        ("dare", {"density": 1.0}, {0: 1, 2: 2, 5: 4, 7: -6}),
        ("dare-ties", {"density": 1.0}, {0: 1, 2: 4, 5: 2, 7: -6}),
    ],
)
def test_two_by_hand(operation, settings, wanted) -> None:
    assert combined(operation, FIRST, SECOND, **settings) == pytest.approx(wanted)


def test_one_by_hand() -> None:
    assert combined("scale", FIRST, weights=(-2.0,)) == {0: -2, 2: 4, 5: -6}
    assert combined("prune", FIRST, density=0.3) == {5: 3}
    assert combined("prune", FIRST, density=0.7, weights=(2.0,)) == {2: -4, 5: 6}


def test_pruning_leaves_one_of_few() -> None:
    assert combined("prune", FIRST, density=0.01) == {5: 3}


@pytest.mark.parametrize("density", [0.25, 0.6])
def test_ties_of_dense_changes_is_pefts(density) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(8, generator=generator) for _ in range(3)]
    changes = [Change(SHAPE, d, None, 8) for d in dense]
    theirs = merge_utils.ties(dense, torch.ones(3), round(density * 8) / 8)
    found = combined("ties", *changes, density=density)
    mine = torch.zeros(8)
    mine[list(found)] = torch.tensor(list(found.values()))
    torch.testing.assert_close(mine, theirs)


def test_dare_keeps_the_sum_on_average_and_the_seed_decides() -> None:
    many = Change((200, 200), torch.ones(40_000), None, 40_000)
    aligned = align(many.shape, [many])
    request = Request("dare", (1.0,), density=0.25)
    values, where = combine(aligned, request, torch.Generator().manual_seed(1))
    assert set(values.unique().tolist()) == {0.0, 4.0}
    assert float(values.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(where, values != 0)
    again, _ = combine(aligned, request, torch.Generator().manual_seed(1))
    other, _ = combine(aligned, request, torch.Generator().manual_seed(2))
    assert torch.equal(again, values) and not torch.equal(other, values)


def test_a_sparse_change_is_added_to_a_dense_one() -> None:
    dense = Change(SHAPE, torch.ones(8), None, 8)
    assert combined("add", dense, FIRST) == {**dict.fromkeys(range(8), 1), 0: 2, 2: -1, 5: 4}
    assert combined("intersect", dense, FIRST) == {0: 1, 2: -0.5, 5: 2}


def test_a_module_of_one_side_alone() -> None:
    aligned = align(SHAPE, [FIRST, None])
    values, where = combine(aligned, Request("add", (1.0, 1.0)), torch.Generator())
    assert values[where].tolist() == [1, -2, 3]
    assert not combine(aligned, Request("intersect", (1.0, 1.0)), torch.Generator())[1].any()


@pytest.mark.parametrize(
    ("request_", "count", "message"),
    [
        (Request("tie", (1.0, 1.0)), 2, "unknown operation; did you mean 'ties'"),
        (Request("add", (1.0,)), 1, "add: got 1 adapters, allowed is at least 2"),
        (Request("scale", (1.0, 1.0)), 2, "scale: got 2 adapters, allowed is 1"),
        (Request("add", (1.0,)), 2, "--weights: got 1 for 2 adapters"),
        (Request("ties", (1.0, 1.0)), 2, "--density: ties needs the share"),
        (Request("add", (1.0, 1.0), 0.5), 2, "--density: add drops nothing"),
        (Request("prune", (1.0,), 1.5), 1, "--density: got 1.5, allowed is 0 < density <= 1"),
    ],
    ids=["name", "few", "many", "weights", "no-density", "density", "range"],
)
def test_a_request_that_cannot_be_served(request_, count, message) -> None:
    with pytest.raises(UserError, match=message):
        check_request(request_, count)


def test_the_command_names_every_operation() -> None:
    import inspect

    from sft.commands.compose import compose

    text = str(inspect.signature(compose).parameters["operation"])
    source = inspect.getsource(compose)
    assert all(name in source + text for name in OPERATIONS)
