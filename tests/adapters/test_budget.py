from __future__ import annotations

import random

import pytest

from sft.adapters.budget import Budget, allocate, allocate_reference

SHAPES = {"a": (10, 10), "b": (7, 3), "c": (1, 1), "d": (30, 40)}
NUMEL = 100 + 21 + 1 + 1200


@pytest.mark.parametrize("seed", range(200))
def test_fact02_the_sum_is_exact(seed: int) -> None:
    draw = random.Random(seed)
    shapes = {
        str(i): (draw.randint(1, 40), draw.randint(1, 40)) for i in range(draw.randint(1, 12))
    }
    sizes = {name: rows * cols for name, (rows, cols) in shapes.items()}
    whole = sum(sizes.values())
    total = draw.randint(1, whole)
    try:
        counts = allocate(total, shapes)
    except ValueError as error:
        assert "leave none for" in str(error)
        assert min(sizes.values()) * total < whole
        return
    assert sum(counts.values()) == total
    for name, count in counts.items():
        assert 1 <= count <= sizes[name]
        assert abs(count - total * sizes[name] / whole) < 1


def test_largest_remainder_first_name_first() -> None:
    assert allocate(4, {"a": (1, 3), "b": (1, 3), "c": (1, 3)}) == {"a": 2, "b": 1, "c": 1}
    assert allocate(5, {"a": (1, 10), "b": (1, 12), "c": (1, 10)}) == {"a": 2, "b": 2, "c": 1}


def test_numbers_beyond_a_double() -> None:
    shapes = {"a": (2**31, 2**31 - 1), "b": (2**31 - 3, 2**31), "c": (2**30, 2**29 + 1)}
    total, whole = 2**61 + 1, sum(rows * cols for rows, cols in shapes.values())
    counts = allocate(total, shapes)
    assert sum(counts.values()) == total
    for name, (rows, cols) in shapes.items():
        assert abs(counts[name] * whole - total * rows * cols) < whole


def test_a_matrix_without_a_weight_is_named() -> None:
    with pytest.raises(ValueError, match=r"leave none for 1 matrices \(first: c, 1 weights\)"):
        allocate(100, SHAPES)


@pytest.mark.parametrize(
    "budget, total",
    [
        ({"density": 1.0}, NUMEL),
        ({"density": 0.1}, 132),
        ({"density": 1e-9}, 0),
        ({"num_weights": 17}, 17),
        ({"match_lora_rank": 3}, 3 * (20 + 10 + 2 + 70)),
    ],
)
def test_totals(budget: dict, total: int) -> None:
    assert Budget(**budget).total(SHAPES) == total


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "density, num_weights, match_lora_rank: got none; set exactly one"),
        ({"density": 0.1, "num_weights": 3}, "got density=0.1, num_weights=3; set exactly one"),
        ({"density": 0}, "density: got 0, allowed is 0 < density <= 1"),
        ({"density": 1.01}, "density: got 1.01"),
        ({"density": float("nan")}, "density: got nan"),
        ({"num_weights": 0}, "num_weights: got 0, allowed is a whole number of at least 1"),
        ({"match_lora_rank": -1}, "match_lora_rank: got -1"),
    ],
)
def test_bad_budgets(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Budget(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("fields", [{"num_weights": NUMEL + 1}, {"match_lora_rank": 13}])
def test_more_than_there_is(fields: dict) -> None:
    with pytest.raises(ValueError, match=r"asks for [\d,]+ weights, the targets hold 1,322"):
        Budget(**fields).total(SHAPES)


def test_the_authors_round_down() -> None:
    # N = int(0.01 * 20000) = 200; int(200 * 100 / 1322) = 15, int(200 * 21 / 1322) = 3
    shapes = {name: SHAPES[name] for name in "abd"}
    assert allocate_reference(0.01, 20_000, shapes) == {"a": 15, "b": 3, "d": 181}
    with pytest.raises(ValueError, match="leaves no weight for c"):
        allocate_reference(0.01, 20_000, SHAPES)
    with pytest.raises(ValueError, match="the targets hold"):
        allocate_reference(0.1, 20_000, SHAPES)


def test_fact02_in_a_model(spiel, llama) -> None:
    targeted = sum(p.numel() for n, p in llama().named_parameters() if "_proj." in n)
    for fields, total in (
        ({"density": 0.037}, round(0.037 * targeted)),
        ({"num_weights": 1001}, 1001),
        ({"match_lora_rank": 2}, 2 * 2 * (4 * 64 + 3 * 96)),
    ):
        trainable, _ = spiel(**fields).get_nb_trainable_parameters()
        assert trainable == total


def test_the_authors_density_is_of_the_whole_model(spiel, llama) -> None:
    whole = sum(p.numel() for p in llama().parameters())
    model = spiel(density=0.05, reference=True)
    targeted = sum(rows * cols for rows, cols in (x.shape for x in layers(model)))
    counts = [layer.delta_values["default"].numel() for layer in layers(model)]
    wanted = [int(0.05 * whole) * x.shape[0] * x.shape[1] // targeted for x in layers(model)]
    assert counts == wanted


def layers(model) -> list:
    return list(model.base_model.adapted_layers("default").values())
