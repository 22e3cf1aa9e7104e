"""Facts of the log: its size, what comes back from the file, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from sft.kernels.mask import Magnitude, Random
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.header import config_of, describe, mask_of
from sft.optim.zeroth_order.log import KEY, ZerothOrderLog
from sft.optim.zeroth_order.trained import Trained


def header(groups: int = 2, **changes: Any) -> dict[str, Any]:
    config = ZerothOrderConfig(**changes)
    masks = [None, Magnitude(0.1), Random(2**63 + 5, 0.25)]
    trained = [
        Trained(f"layers.{i}.weight", nn.Parameter(torch.zeros(4, i + 1)), i, masks[i % 3])
        for i in range(3)
    ]
    held = [{"params": [t.parameter], "weight_decay": 0.0} for t in trained[: groups - 1]]
    last = {"params": [t.parameter for t in trained[groups - 1 :]], "weight_decay": 0.1}
    return describe(config, [*held, last], trained, seed=3, queries=config.queries)


def filled(rows: list[Any], groups: int = 2, **changes: Any) -> ZerothOrderLog:
    log = ZerothOrderLog(header(groups, **changes))
    for gradients, rates in rows:
        log.append(gradients, rates)
    return log


def size(log: ZerothOrderLog, folder: Path) -> int:
    log.save(folder / "log.safetensors")
    return (folder / "log.safetensors").stat().st_size


ROWS = [
    ((0.5,), (1e-6, 1e-6)),
    ((-0.25,), (1e-6, 1e-6)),
    (None, (1e-6, 1e-6)),
    ((2.0,), (1e-6 / 3, 2e-6)),
    ((-0.0,), (0.0, 2e-6)),
]


def test_the_file_gives_back_every_row_and_the_header(tmp_path: Path) -> None:
    log = filled(ROWS)
    log.header["end_sha"] = "abc"
    log.save(tmp_path / "log.safetensors")
    found = ZerothOrderLog.load(tmp_path / "log.safetensors")
    assert found.header == log.header
    assert len(found) == 5 and list(found.rows) == list(log.rows) == ROWS
    assert (
        math.copysign(1, next(row.gradients[0] for row in [*found.rows][4:] if row.gradients)) < 0
    )
    assert [mask_of(row) for row in found.header["trained"]] == [
        None,
        Magnitude(0.1),
        Random(2**63 + 5, 0.25),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["log.safetensors"]  # nothing temporary


def test_a_log_read_back_goes_on(tmp_path: Path) -> None:
    filled(ROWS[:2]).save(tmp_path / "log.safetensors")
    found = ZerothOrderLog.load(tmp_path / "log.safetensors")
    for gradients, rates in ROWS[2:]:
        found.append(gradients, rates)
    assert list(found.rows) == ROWS
    assert found.tensors()["lengths"].tolist() == [3, 1, 1]


def test_several_queries_and_an_empty_log(tmp_path: Path) -> None:
    rows = [((0.5, 1.5, -2.0), (1e-3,)), (None, (1e-3,))]
    for some in (rows, []):
        log = filled(some, groups=1, queries=3)
        log.save(tmp_path / "log.safetensors")
        found = ZerothOrderLog.load(tmp_path / "log.safetensors")
        assert list(found.rows) == some and found.tensors()["gradients"].shape == (len(some), 3)


@pytest.mark.parametrize("queries", [1, 4])
def test_z10_a_moving_schedule_costs_at_most_16_bytes_an_update(
    tmp_path: Path, queries: int
) -> None:
    """Two groups of one schedule, as the Trainer makes them for weight decay."""
    count = 3000
    empty = size(filled([], queries=queries), tmp_path)
    rows = [([0.1] * queries, (1e-6 * (1 - i / count),) * 2) for i in range(count)]
    assert size(filled(rows, queries=queries), tmp_path) - empty <= (12 + 4 * queries) * count + 64
    assert 12 + 4 * queries <= 16 * queries


def test_z10_twenty_thousand_updates_at_a_constant_rate_take_80_kilobytes(tmp_path: Path) -> None:
    rows = [([0.1], (1e-6, 1e-6))] * 20_000
    whole = size(filled(rows), tmp_path)
    assert whole < 20_000 * 4 + 3000 < 100_000
    half = size(filled(rows, log_dtype="float16"), tmp_path)
    assert half < 20_000 * 2 + 3000


def test_the_configuration_comes_back_but_for_a_function() -> None:
    config = ZerothOrderConfig(queries=2, noise="gaussian", betas=(0.5, 0.75), clip=3.0, seed=3)
    assert config_of(header(queries=2, noise="gaussian", betas=(0.5, 0.75), clip=3.0)) == config
    assert config_of(header(objective=len)).objective == "loss"
    json.dumps(header(objective=len), allow_nan=False)


def damage(path: Path, change: Any) -> None:
    """Rewrite a log after `change` has been at its header and tensors."""
    with safe_open(str(path), framework="pt") as file:
        entry = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(entry, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={KEY: json.dumps(entry)}))


def put(name: str, place: Any, value: Any) -> Any:
    return lambda _, tensors: tensors[name].__setitem__(place, value)


def swap(name: str, change: Any) -> Any:
    return lambda _, tensors: tensors.update({name: change(tensors[name])})


def entry(key: str, value: Any) -> Any:
    return lambda held, _: held.update({key: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("gradients", 0, math.inf), "a projected gradient is not finite"),
        (put("rates", 0, math.nan), "a learning rate is not finite or < 0"),
        (put("rates", 0, -1.0), "a learning rate is not finite or < 0"),
        (put("lengths", 0, 0), "a length is not positive"),
        (put("lengths", 0, 99), "lengths do not sum to the number of updates"),
        (put("columns", 0, 9), "columns are out of range"),
        (put("columns", 0, -1), "columns are out of range"),
        (swap("gradients", lambda t: t[:-1].clone()), "lengths do not sum"),
        (swap("gradients", lambda t: t.view(-1, 1).repeat(1, 2)), r"shape \(5, 2\)"),
        (swap("gradients", lambda t: t.double()), "gradients are torch.float64"),
        (swap("rates", lambda t: t.float()), "rates are torch.float32"),
        (swap("rates", lambda t: t[:-1].clone()), "rates and lengths differ"),
        (swap("columns", lambda t: t[:1].clone()), "columns have shape"),
        (lambda _, tensors: tensors.pop("rates"), "it holds the tensors columns, gradients"),
        (lambda _, tensors: tensors.update(more=torch.zeros(1)), "it holds the tensors"),
        (entry("format", 2), "its format is 2"),
        (entry("format", None), "its format is None"),
        (entry("noise", "uniform"), "noise: got 'uniform'"),
        (entry("queries", 0), "queries: got 0"),
        (entry("seed", -1), "seed"),
        (entry("seed", None), "its seed is no number"),
        (entry("groups", []), "it has no groups"),
        (entry("groups", [{"weight_decay": math.nan}]), "weight decay of a group"),
        (entry("groups", [{}]), "weight decay of a group"),
        (entry("trained", []), "it has no trained set"),
        (entry("trained", [["w", [2], "float32", 0, math.inf]]), "no entry of a trained set"),
        (entry("trained", [["w", [2], "float32", 7, None]]), "no entry of a trained set"),
        (entry("trained", [["w", [2], "Tensor", 0, None]]), "no entry of a trained set"),
        (entry("trained", [["w", [2], "float32", 0, [5, 1.5]]]), "share: got 1.5"),
        (entry("trained", [["w", [2], "float32", 0, None]] * 2), "twice"),
        (lambda held, _: held.pop("eps"), "its header lacks eps"),
    ],
)
def test_a_damaged_log_is_refused_with_the_reason(tmp_path: Path, change: Any, reason: str) -> None:
    path = tmp_path / "log.safetensors"
    filled(ROWS).save(path)
    damage(path, change)
    with pytest.raises(ValueError, match=reason) as caught:
        ZerothOrderLog.load(path)
    message = str(caught.value)
    assert message.startswith(f"log: {path} is damaged") and "\n" not in message


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"{" * 100_000, b"whatever" * 9])
def test_what_is_no_log_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or not a zeroth-order log"):
        ZerothOrderLog.load(path)


def test_any_cut_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    filled(ROWS).save(path)
    whole = path.read_bytes()
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="is damaged"):
            ZerothOrderLog.load(path)


def test_another_safetensors_file_and_a_foreign_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=f"it holds no {KEY} entry"):
        ZerothOrderLog.load(path)
    deep = {KEY: "[" * 100_000}
    safetensors.torch.save_file(filled(ROWS).tensors(), path, metadata=deep)
    with pytest.raises(ValueError, match="is damaged"):
        ZerothOrderLog.load(path)


@pytest.mark.parametrize("failing", ["pathlib.Path.write_bytes", "os.replace"])
def test_a_write_that_fails_leaves_the_former_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "log.safetensors"
    filled(ROWS).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match="no space"):
        filled(ROWS[:1]).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
