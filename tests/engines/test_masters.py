"""Values that an engine keeps in float32 apart, and parameters that it keeps in parts."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sft.adapters.gathered import gathered, is_partitioned
from sft.engines import partitioned
from sft.engines.masters import full_precision, is_value, load_values, value_key, values_of


def test_what_is_trained_in_float32_is_kept_as_it_was() -> None:
    model = nn.Module()
    model.trained = nn.Parameter(torch.arange(3.0))
    model.halves = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    model.away = nn.Parameter(torch.empty(0))
    model.away.ds_id = 7  # its values are elsewhere
    found = full_precision(model)
    model.trained.data.zero_()  # an engine casts it
    assert list(found) == [value_key("trained")]
    assert found[value_key("trained")].tolist() == [0.0, 1.0, 2.0]
    assert is_value(value_key("trained")) and not is_value("state//trained//exp_avg")


def test_engines_without_masters_are_left_alone() -> None:
    given = {}
    engine = SimpleNamespace(load_values=given.update, values=lambda: {"a": torch.ones(1)})
    plain = SimpleNamespace()
    load_values(plain, {"a": torch.ones(1)})
    load_values(engine, {})
    assert given == {}
    load_values(engine, {"b": torch.ones(1)})
    assert set(given) == {"b"}
    assert set(values_of(engine)) == {"a"} and values_of(plain) == {}


# -- partitioned by ZeRO-3 -----------------------------------------------------------------------


@pytest.fixture
def gathers(monkeypatch):
    """What DeepSpeed is asked to gather; like it, refuses what is gathered already."""
    deepspeed = pytest.importorskip("deepspeed")
    asked, held = [], set()

    @contextmanager
    def fake(parameters, modifier_rank):
        keys = {id(p) for p in parameters}
        assert not keys & held and modifier_rank == 0
        asked.append(len(parameters))
        held.update(keys)
        try:
            yield
        finally:
            held.difference_update(keys)

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", fake)
    return asked


def parts(count):
    made = [nn.Parameter(torch.zeros(2)) for _ in range(count)]
    for i, parameter in enumerate(made):
        parameter.ds_id = i
    assert all(is_partitioned(p) for p in made)
    return made


def test_parts_are_gathered_once_and_given_back(gathers) -> None:
    one, two = parts(2)
    plain = nn.Parameter(torch.zeros(1))
    with gathered([plain]):
        assert gathers == []
    with gathered([one, one, plain]):
        assert gathers == [1]
        one.add_(1.0)  # a leaf: as torch.no_grad
        with gathered([one]):
            assert gathers == [1]
        with gathered([one, two]):
            assert gathers == [1, 1]
    with gathered([one, two]):
        assert gathers == [1, 1, 2]


def test_parts_are_given_back_after_an_error(gathers) -> None:
    held = parts(1)
    with pytest.raises(ZeroDivisionError), gathered(held):
        raise ZeroDivisionError
    assert not partitioned._open
    with gathered(held):
        assert gathers == [1, 1]
