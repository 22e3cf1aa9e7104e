"""Every strategy on disk: a seeded set of k positions; and what each one promises."""

from __future__ import annotations

import pytest
import torch

import sft
from sft.adapters.select import Candidates, seeded, strategy, strategy_names
from sft.adapters.selection.random import random_subset
from sft.kernels.topk import top_k_reference

SHAPES = [(1, 1), (1, 7), (13, 9), (40, 50)]


def candidates(shape, *, seed=0, name="m", dtype=torch.float32, largest=True, weight=None):
    generator = torch.Generator().manual_seed(5)
    if weight is None:
        weight = torch.randn(shape, generator=generator).bfloat16().to(dtype)
    scores = torch.rand(shape[0] * shape[1], generator=generator)
    return Candidates(
        shape=shape,
        read=lambda: weight,
        scores=scores,
        largest=largest,
        generator=seeded(seed, "select", name),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", strategy_names())
def test_fact04_k_distinct_ascending_positions(name: str, shape: tuple[int, int]) -> None:
    numel = shape[0] * shape[1]
    for k in sorted({1, max(1, numel // 10), max(1, numel // 2), numel}):
        chosen = strategy(name).select(candidates(shape), k)
        assert (chosen.dtype, chosen.shape) == (torch.int64, (k,))
        assert chosen[0] >= 0 and chosen[-1] < numel
        assert (chosen[1:] > chosen[:-1]).all()


@pytest.mark.parametrize("name", strategy_names())
def test_same_seed_same_set_whatever_else_is_random(name: str) -> None:
    chosen = []
    for dtype, state in ((torch.float32, 1), (torch.bfloat16, 2), (torch.float64, 3)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        chosen.append(strategy(name).select(candidates((13, 9), dtype=dtype), 20))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])


def test_random_differs_by_seed_and_by_matrix() -> None:
    drawn = {
        tuple(strategy("random").select(candidates((13, 9), seed=seed, name=name), 20).tolist())
        for seed in (0, 1)
        for name in ("a", "b")
    }
    assert len(drawn) == 4


@pytest.mark.parametrize("numel, k", [(20, 3), (20, 4), (20, 5), (20, 20), (1, 1), (3, 0)])
def test_random_subsets_are_uniform(numel: int, k: int) -> None:
    generator, hits, rounds = torch.Generator().manual_seed(0), torch.zeros(numel), 4000
    for _ in range(rounds):
        subset = random_subset(numel, k, generator)
        assert subset.unique().numel() == k
        hits[subset] += 1
    p = k / numel
    assert (hits / rounds - p).abs().max() <= 4.5 * (p * (1 - p) / rounds) ** 0.5


def test_random_subsets_of_a_large_matrix_take_little_memory(largest_tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    assert largest_tensor(lambda: random_subset(10**9, 1000, generator)) <= 8 * 2 * 1200


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 20, 117])
def test_magnitude_equals_brute_force(k: int, largest: bool) -> None:
    weight = torch.randint(-5, 6, (13, 9)).float()
    chosen = strategy("magnitude").select(candidates((13, 9), weight=weight, largest=largest), k)
    sign = 1 if largest else -1
    assert torch.equal(chosen, top_k_reference(sign * weight.abs().flatten(), k))


def test_scores_are_read_chunk_by_chunk(monkeypatch) -> None:
    from sft.adapters import select

    expected = strategy("fisher").select(candidates((13, 9)), 20)
    monkeypatch.setattr(select, "_CHUNK", 10)
    assert torch.equal(strategy("fisher").select(candidates((13, 9)), 20), expected)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="selection: got 'best', allowed are fisher, gradient"):
        strategy("best")


CALIBRATED = [name for name in strategy_names() if strategy(name).CALIBRATED]
SCORES = {"gradient": torch.abs, "fisher": torch.square}


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("mode", ["aside", "resident"])
@pytest.mark.parametrize("name", SCORES)
def test_calibrated_scores_are_those_of_dense_autograd(
    llama, spiel, batch, name, mode, order
) -> None:
    batches = [{key: ids.roll(i, dims=1) for key, ids in batch.items()} for i in range(3)]
    targets = ["q_proj", "down_proj", "embed_tokens"]
    dense, scores = llama(), {}
    for each in batches[:2]:
        dense.zero_grad()
        dense(**each).loss.backward()
        for key, parameter in dense.named_parameters():
            part = SCORES[name](parameter.grad).flatten()
            scores[key] = scores.get(key, 0) + part
    model = spiel(
        target_modules=targets, selection=name, selection_order=order, calibration_batches=2
    ).train()
    if mode == "aside":
        assert sft.calibrate(model, batches) == 2
    else:
        with sft.resident(model):
            assert sft.calibrate(model, batches) == 2
    assert model.training
    assert len(model.base_model.adapted_layers("default")) == 5
    for key, layer in model.base_model.adapted_layers("default").items():
        truth = scores[key + ".weight"]
        values, k = layer.delta_values["default"], layer.delta_values["default"].numel()
        assert values.grad is None and not values.any()
        chosen = layer.delta_indices["default"].long()
        sign = 1 if order == "largest" else -1
        best = (sign * truth).topk(k).values
        # equal up to rounding: positions may trade places where scores tie
        torch.testing.assert_close(
            (sign * truth[chosen]).sort(descending=True).values, best, rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize("name", CALIBRATED)
def test_training_waits_for_calibration(spiel, batch, name) -> None:
    model = spiel(selection=name)
    model.eval()(**batch)
    with pytest.raises(RuntimeError, match=r"call sft\.calibrate"):
        model.train()(**batch)
    sft.calibrate(model, [batch])
    model(**batch).loss.backward()


def test_calibration_draws_nothing_and_drops_nothing_out(llama, spiel, batch) -> None:
    chosen = []
    for state in (1, 2):
        base = llama(attention_dropout=0.5)
        model = spiel(base, target_modules=["q_proj"], selection="gradient").train()
        torch.manual_seed(state)
        before = torch.get_rng_state()
        sft.calibrate(model, [batch])
        assert torch.equal(torch.get_rng_state(), before)
        layers = model.base_model.adapted_layers("default").values()
        chosen.append(torch.cat([layer.delta_indices["default"] for layer in layers]))
    assert torch.equal(*chosen)


def test_calibration_says_what_is_missing(spiel, batch) -> None:
    model = spiel(selection="gradient")
    with pytest.raises(ValueError, match="calibration: got no batches"):
        sft.calibrate(model, [])
    with pytest.raises(ValueError, match="they need labels"):
        sft.calibrate(model, [{"input_ids": batch["input_ids"]}])
    for layer in model.base_model.adapted_layers("default").values():
        assert layer.site("default").tap is None


def test_calibration_names_a_layer_that_got_no_gradient(spiel, llama, batch) -> None:
    base = llama()
    base.unused = torch.nn.Linear(8, 8)
    model = spiel(base, target_modules=["q_proj", "unused"], selection="gradient")
    with pytest.raises(ValueError, match="calibration: 'unused' got no gradient"):
        sft.calibrate(model, [batch])


def test_a_stream_of_unknown_length_calibrates(spiel, batch) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([batch] * 20)

    model = spiel(target_modules=["q_proj"], selection="gradient", calibration_batches=3)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert sft.calibrate(model, loader) == 3
