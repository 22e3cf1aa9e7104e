"""Pages and figures say what the results hold, and only then count as up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plots
import pytest
import report_methods
import report_performance
from method_results import LABELS, MAIN, Found, read

# backward seconds of three rounds; the floor takes 1, 2, 1
BACKWARD = {
    "floor": (1.0, 2.0, 1.0),
    "lora": (2.0, 4.0, 2.0),
    "spiel": (1.5, 3.0, 1.5),
    "spiel_sparse": (1.05, 2.1, 1.05),
    "s2ft_sparse": (1.2, 2.0, 1.1),
    "spiel_window": (1.0, 2.0, 1.0),
    "spiel_reselect": (1.0, 2.0, 1.0),
}
SELECTION = {"spiel_window": 0.25, "spiel_reselect": 1.0}
SAVED = {"lora": 60, "spiel_sparse": 50, "s2ft_sparse": 61}


def found(case: str) -> dict[str, Any]:
    steps = [
        {"forward": 0.0, "backward": seconds, "optimizer": 0.0, "wall": seconds}
        | {"selection": SELECTION.get(case, 0.0)}
        for seconds in BACKWARD[case]
    ]
    held = dict.fromkeys(("frozen", "trained", "indices", "originals", "optimizer", "gradients"), 8)
    middle = sorted(steps, key=lambda step: step["backward"])[1]
    config = {"model_id": "m", "dtype": "float32", "batch_size": 4, "max_seq_length": 128}
    system = {"threads": 2, "processor": "a processor"}
    profile = {"backward": {"mm": 10.0, "sampled_outer": 3.0 * (case != "floor")}}
    return {
        "run_info": {"train_config": config},
        "train_info": {
            "num_trainable_params": 0 if case == "floor" else 2,
            "file_size": 10,
            "step": {"cpu_seconds": steps, "median_cpu_seconds": middle, "profile_ms": profile},
            "bytes": {**held, "saved": {"Linear": SAVED.get(case, 40) * 2**20}},
        },
        "meta_info": {"system_info": system},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for case in BACKWARD:
        cell = f"{MAIN}-more" if case in SELECTION else MAIN
        (tmp_path / f"{case}--{cell}.json").write_text(json.dumps(found(case)))
    (tmp_path / f"floor--{MAIN}-more.json").write_text(json.dumps(found("floor")))
    (tmp_path / "floor--bfloat16-1x128.json").write_text(json.dumps(found("floor")))
    return tmp_path


def test_steps_are_compared_within_a_round(folder: Path) -> None:
    """The middle of the ratios, not the ratio of the middles."""
    cells = read(folder)
    assert list(cells) == [MAIN, f"{MAIN}-more", "bfloat16-1x128"]
    own, floor = cells[MAIN]["s2ft_sparse"], cells[MAIN]["floor"]
    assert own.ratio(floor) == pytest.approx((1.1, 1.0, 1.2))


def test_every_case_has_a_label() -> None:
    from method_cases import CASES

    assert CASES.keys() == LABELS.keys()


def test_the_section_shows_steps_bytes_and_selection(folder: Path) -> None:
    text = report_methods.section(read(folder))
    row = f"| {LABELS['spiel_sparse']} | 2 | 1.05 (1.05-1.05) | 0.00 | 1.05 | 0.00 | 50 MiB |"
    assert row in text
    # (4 x 0.25 + 1) / 20 of a second, of a floor of one second
    assert "selection takes 100 ms of CPU time an update, 10.0% of the floor" in text


def test_targets_are_judged(folder: Path) -> None:
    results = {"switching": {"pairs": {"S2FT": {"verbs": {"merge": {"lora_over_ours": 9.9}}}}}}
    page = report_performance.page(read(folder), results)
    assert (
        f"| step of {LABELS['spiel_sparse']}, over the frozen floor | <= 1.1 | 1.05 | met |" in page
    )
    assert "over the frozen floor | <= 1.04 | 1.10 | **missed** |" in page
    assert "| below every peer | not below lora | **missed** |" in page
    assert "| merge of S2FT: PEFT LoRA's time over ours | >= 10 | 9.9 | **missed** |" in page
    assert "Beyond the floor, ms: `sampled_outer` 3." in page
    assert "| sparse gradients | 3 |" in page


def test_a_figure_is_current_until_its_numbers_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "FIGURES", tmp_path / "figures")
    cells = read(folder)
    assert len(plots.draw(cells)) == 3
    assert plots.draw(cells) == []
    changed = found("lora")
    changed["train_info"]["bytes"]["saved"]["Linear"] += 2**20
    cells[MAIN]["lora"] = Found(changed)
    assert [path.stem for path in plots.draw(cells)] == ["bytes"]


def test_the_model_knows_builds_that_exist() -> None:
    pytest.importorskip("triton")
    from collections import Counter

    from device_cases.base import collected
    from kernel_model import WORK, bound
    from without_gpu.audit import Audit

    assert WORK.keys() <= collected("BUILDS").keys()
    code = {"registers": 1, "spills": 0, "stack": 0, "shared": 0, "warps": 4}
    short, long = (
        Audit(name="k", **code, instructions=Counter(FADD=count)) for count in (1, 10_000)
    )
    one, other = bound("displace: gaussian", short), bound("displace: gaussian", long)
    assert one is not None
    assert other is not None
    assert (one["set_by"], other["set_by"]) == ("memory", "issue")
    # 64 MiB at nine tenths of 3.35 TB/s
    assert one["microseconds"] == pytest.approx(64 * 2**20 / (0.9 * 3.35e6), rel=0.01)
    assert bound("unknown", short) is None
