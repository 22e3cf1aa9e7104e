"""Budgets in whole units: hand-made slots, and the published counts on the meta device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sft.adapters.budget import Budget
from sft.adapters.slices.budget import by_ratio, by_weights
from sft.adapters.slices.units import Slot


def slots(layers=4, o=32, down=64, hidden=32, head=1):
    for layer in range(layers):
        yield Slot("o", f"{layer}.o", "in", torch.arange(o).view(-1, head), hidden)
        yield Slot("down", f"{layer}.down", "in", torch.arange(down)[:, None], hidden)


def counts(quotas):
    return {(quota.slots[0].module, quota.slots[0].role): quota.count for quota in quotas}


@pytest.mark.parametrize(
    "ratio, expected", [(0.001, 1), (0.02, 1), (0.024, 2), (0.5, 32), (0.99, 63), (1.0, 64)]
)
def test_uniform_ratio_rounds_half_up_and_takes_at_least_one(ratio, expected) -> None:
    found = counts(by_ratio(list(slots()), ratio, "uniform"))
    assert {count for (_, role), count in found.items() if role == "down"} == {expected}


def test_a_ratio_for_each_role() -> None:
    found = counts(by_ratio(list(slots()), {"o": 0.5, "down": 0.25}, "uniform"))
    assert set(found.values()) == {16} and len(found) == 8


def test_pooled_ratio_counts_over_all_layers() -> None:
    pools = by_ratio(list(slots()), {"o": 0.1, "down": 0.03}, "pooled")
    assert [(len(p.slots), p.num_units, p.count) for p in pools] == [(4, 128, 12), (4, 256, 7)]
    with pytest.raises(ValueError, match=r"^ratio: 0.001 of 128 units of role 'o' is none"):
        by_ratio(list(slots()), 0.001, "pooled")


@pytest.mark.parametrize("allocation", ["uniform", "pooled"])
@pytest.mark.parametrize("total", [300, 777, 1500, 2048, 9000])
def test_weights_are_shared_equally_between_roles_and_rounded_down_to_units(
    total, allocation
) -> None:
    everything = list(slots())
    quotas = by_weights(everything, Budget(num_weights=total), allocation)
    by_role = Counter[str]()
    for quota in quotas:
        by_role[quota.slots[0].role] += quota.count * quota.slots[0].unit_weights
    assert total - 32 < by_role.total() <= total
    assert abs(by_role["o"] - by_role["down"]) <= 32 * 8 or by_role["o"] == 4 * 32 * 32
    if allocation == "uniform":
        for role in ("o", "down"):
            found = [n for (_, r), n in counts(quotas).items() if r == role]
            assert max(found) - min(found) <= 1


def test_a_role_that_is_full_leaves_the_rest_to_the_others() -> None:
    quotas = by_weights(list(slots()), Budget(num_weights=4 * 32 * 80), "uniform")
    found = counts(quotas)
    assert {found[f"{i}.o", "o"] for i in range(4)} == {32}
    assert {found[f"{i}.down", "down"] for i in range(4)} == {48}


def test_all_of_it() -> None:
    quotas = by_weights(list(slots()), Budget(density=1.0), "uniform")
    assert all(quota.count == quota.num_units for quota in quotas)


def test_match_lora_rank_counts_both_sides_of_each_matrix() -> None:
    quotas = by_weights(list(slots(layers=2)), Budget(match_lora_rank=3), "uniform")
    trained = sum(quota.count * quota.slots[0].unit_weights for quota in quotas)
    assert 0 <= 3 * 2 * (32 + 32 + 64 + 32) - trained < 32


def test_a_budget_too_small_for_whole_heads_is_refused() -> None:
    heads = list(slots(head=8))
    with pytest.raises(ValueError, match=r"num_weights=900: .* no unit for '.*\.o'") as caught:
        by_weights(heads, Budget(num_weights=900), "uniform")
    assert "\n" not in str(caught.value)


# -- published counts ------------------------------------------------------------------------

LLAMA2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA3_8B = LLAMA2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}


def pooled(sizes, **settings):
    """Units by role that the configuration gives a model on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft import S2FTConfig
    from sft.adapters.slices.targets import target_groups

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    config = S2FTConfig(allocation="pooled", attention_unit="heads", **settings)
    found: Counter[str] = Counter()
    weights = 0
    for quota in config.quotas(target_groups(model, config)):
        found[quota.slots[0].role] += quota.count
        weights += quota.count * quota.slots[0].unit_weights
    return dict(found), weights


def test_s2ft_fact17_llama3_8b() -> None:
    found, weights = pooled(LLAMA3_8B, ratio={"down": 0.03})
    assert found == {"down": 13762}
    assert round(weights / 1e6, 1) == 56.4


def test_s2ft_fact17_llama2_7b() -> None:
    found, weights = pooled(LLAMA2_7B, ratio={"o": 0.052, "down": 0.02})
    assert found == {"o": 53, "down": 7045}
    assert round(weights / 1e6, 1) == 56.6
