"""Descriptions and comparisons: numbers as counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sft.errors import UserError
from sft.tools.change import Change
from sft.tools.compare import compare, compare_change, total
from sft.tools.describe import describe, layer_of, type_of
from sft.tools.found import find_changes


def sparse(indices: list[int], values: list[float]) -> Change:
    return Change((2, 4), torch.tensor(values), torch.tensor(indices), len(values))


def test_counts_and_norms_are_those_of_the_deltas(saved, deltas) -> None:
    folder = saved("one")
    wanted, found = deltas(folder), describe(folder)
    assert found["trained"] == sum(int((d != 0).sum()) for d in wanted.values())
    assert found["weights"] == sum(d.numel() for d in wanted.values())
    assert found["density"] == pytest.approx(found["trained"] / found["weights"])
    norm = math.sqrt(sum(float(d.double().square().sum()) for d in wanted.values()))
    assert found["delta_norm"] == pytest.approx(norm)
    assert found["delta_max"] == max(float(d.abs().max()) for d in wanted.values())
    name, delta = next(iter(wanted.items()))
    assert found["modules"][name]["shape"] == list(delta.shape)
    assert found["modules"][name]["delta_norm"] == pytest.approx(float(delta.norm()))


def test_layers_and_types_add_up(saved) -> None:
    found = describe(saved("one"))
    for part in ("layers", "types"):
        assert sum(row["trained"] for row in found[part].values()) == found["trained"]
        assert sum(row["modules"] for row in found[part].values()) == len(found["modules"])
    assert list(found["layers"]) == ["0", "1"]
    assert found["types"].keys() >= {"q_proj", "down_proj"}


def test_layers_come_in_the_order_of_their_numbers(saved, llama, tmp_path) -> None:
    llama(num_hidden_layers=11).save_pretrained(tmp_path / "deep")
    found = describe(saved("one", over=tmp_path / "deep"))
    assert list(found["layers"]) == [str(i) for i in range(11)]
    assert layer_of("score") == "-" and type_of("model.layers.3.mlp.up_proj") == "up_proj"


def test_ranks_are_those_that_are_open(saved) -> None:
    found = describe(saved("one", "sora"))
    assert found["ranks"] == [3, 3]
    assert {row["rank"] for row in found["modules"].values()} == {3}
    assert "ranks" not in describe(saved("two"))


def test_a_model_in_memory_is_described_as_its_folder(saved, base) -> None:
    folder = saved("one", "s2ft")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert describe(model) == describe(folder)


def test_the_hash_is_that_of_the_support_alone(saved) -> None:
    one, same, other = saved("one"), saved("two"), saved("three", seed=1)
    hashes = [describe(folder)["support_hash"] for folder in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_two_changes_are_counted_by_hand() -> None:
    first = sparse([0, 2, 5], [1.0, -2.0, 3.0])
    second = sparse([2, 5, 7], [2.0, 1.0, 4.0])
    found = total([compare_change("m", first, second)])
    assert (found["first"], found["second"], found["shared"]) == (3, 3, 2)
    assert found["jaccard"] == 2 / 4
    assert found["opposite"] == 1 and found["conflict"] == 1 / 2
    assert found["distance"] == pytest.approx(math.sqrt(1 + 16 + 4 + 16))
    assert found["cosine"] == pytest.approx((-4 + 3) / math.sqrt(14 * 21))


def test_a_module_of_one_side_alone_counts_as_untouched_on_the_other() -> None:
    found = total([compare_change("m", None, sparse([1], [2.0]))])
    assert (found["first"], found["second"], found["jaccard"]) == (0, 1, 0.0)
    assert found["distance"] == 2.0 and found["cosine"] == 0.0


def test_an_adapter_is_at_no_distance_from_itself(saved) -> None:
    changes = find_changes(str(saved("one")))
    found = compare(changes, changes)
    assert found["jaccard"] == 1.0 and found["distance"] == 0.0 and found["conflict"] == 0.0
    assert found["cosine"] == pytest.approx(1.0)
    assert set(found["modules"]) == set(changes.names())


def test_a_dense_change_meets_a_sparse_one(saved, deltas) -> None:
    folders = saved("one"), saved("two", "lora")
    dense = [deltas(folder) for folder in folders]
    found = compare(*(find_changes(str(folder)) for folder in folders))
    gap = sum(float((dense[0][n] - dense[1][n]).double().square().sum()) for n in dense[0])
    assert found["distance"] == pytest.approx(math.sqrt(gap), rel=1e-6)
    assert found["shared"] == found["first"]


def test_weights_of_two_shapes_are_not_compared() -> None:
    other = Change((4, 2), torch.ones(1), torch.tensor([0]), 1)
    with pytest.raises(UserError, match=r"m is \(2, 4\) in one and \(4, 2\) in the other"):
        compare_change("m", sparse([0], [1.0]), other)


def test_the_same_positions_of_another_module_are_another_support(saved) -> None:
    found = []
    for name in ("q_proj", "k_proj"):
        folder = saved(name, target_modules=[f"layers.0.self_attn.{name}"], density=1.0)
        found.append(describe(folder)["support_hash"])
    assert found[0] != found[1]
