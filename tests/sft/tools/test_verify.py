"""Every damage to an adapter is found, and named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.export.delta import save_delta
from sft.tools.describe import describe
from sft.tools.verify import FAILED, NOTE, OK, verify_adapter
from sft.tools.verify_delta import verify_delta

NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def verdicts(checks) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def failed(checks) -> dict[str, str]:
    return {check.name: check.text for check in checks if check.verdict == FAILED}


@pytest.mark.parametrize("method", ["spiel", "s2ft", "sora", "sltrain"])
def test_a_whole_adapter_passes(saved, method) -> None:
    assert set(verdicts(verify_adapter(saved("one", method))).values()) == {OK}


def test_stock_adapters_have_no_fingerprints(saved) -> None:
    found = verdicts(verify_adapter(saved("one", "lora")))
    assert found.pop("base") == NOTE and set(found.values()) == {OK}


def edited(folder, change) -> None:
    """Write the adapter's file anew with its tensors changed."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _nan(tensors) -> None:
    tensors[f"{NAME}.delta_values"][3] = float("nan")


def _shorter(tensors) -> None:
    tensors[f"{NAME}.delta_values"] = tensors[f"{NAME}.delta_values"][:-1].contiguous()


def _missing(tensors) -> None:
    del tensors[f"{NAME}.delta_indices"]


def _positions(change):
    """Write the positions of a module as plain indices, changed."""

    def edit(tensors) -> None:
        count = len(tensors[f"{NAME}.delta_values"])
        tensors[f"{NAME}.delta_indices"] = change(torch.arange(count, dtype=torch.int32))

    return edit


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (_nan, "values", "q_proj.delta_values holds 1 values that are not finite"),
        (_shorter, "fit", r"q_proj.delta_(values|indices) holds"),
        (_missing, "fit", "q_proj.delta_indices' is missing"),
        (_positions(lambda p: p.flip(0).contiguous()), "fit", "must be strictly ascending"),
        (_positions(lambda p: p.clamp(min=1)), "fit", "must be strictly ascending"),
        (_positions(lambda p: p + 1000), "fit", r"is outside \[0, 1024\)"),
        (_positions(lambda p: p - 1), "fit", r"position -1 is outside"),
    ],
    ids=["nan", "short", "missing", "order", "twice", "above", "below"],
)
def test_damage_is_found(saved, change, check, message) -> None:
    folder = saved("one")
    edited(folder, change)
    found = failed(verify_adapter(folder))
    assert list(found) == [check]
    import re

    assert re.search(message, found[check])


def test_a_truncated_file_is_found(saved) -> None:
    folder = saved("one")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = verify_adapter(folder)
    assert [check.name for check in found] == ["files"]
    assert "does not read" in failed(found)["files"]


def test_another_base_is_found(saved, llama, tmp_path) -> None:
    other = llama()
    torch.nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    found = failed(verify_adapter(saved("one"), str(tmp_path / "other")))
    assert list(found) == ["base"]
    assert "1 of 14 modules were trained on other weights" in found["base"]
    assert "first model.layers.1.mlp.up_proj" in found["base"]


def test_a_base_in_another_precision_is_the_same(saved, llama, tmp_path) -> None:
    folder = saved("one")
    for dtype, verdict in ((torch.bfloat16, OK), (torch.float16, NOTE)):
        llama().to(dtype).save_pretrained(tmp_path / "half")
        assert verdicts(verify_adapter(folder, str(tmp_path / "half")))["base"] == verdict


def test_the_support_is_that_of_the_run_or_the_one_asked_for(saved, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    folder = saved("one").rename(tmp_path / "run" / "adapter")
    noted = describe(folder)["support_hash"]
    record = tmp_path / "run" / "run.json"
    record.write_text(json.dumps({"support": {"support_hash": noted}}))
    assert "that of run.json" in {c.name: c.text for c in verify_adapter(folder.parent)}["support"]
    record.write_text(json.dumps({"support": {"support_hash": "0" * 64}}))
    assert list(failed(verify_adapter(folder.parent))) == ["support"]
    assert failed(verify_adapter(folder.parent, support=noted[:8])) == {}
    assert list(failed(verify_adapter(folder.parent, support="beef"))) == ["support"]


def test_other_versions_are_noted(saved) -> None:
    folder = saved("one")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": "0.0.1"}))
    found = verify_adapter(folder)
    assert verdicts(found)["versions"] == NOTE and "peft 0.0.1 (here" in found[-1].text


def test_unknown_settings_are_found(saved) -> None:
    folder = saved("one")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "density": 7}))
    assert "density: got 7" in failed(verify_adapter(folder))["settings"]


@pytest.fixture
def delta(base, llama, tmp_path):
    """A delta of the model itself, and the model it is of."""
    before = {n: p.detach() for n, p in llama().named_parameters() if "mlp" in n}
    after = {name: tensor.clone() for name, tensor in before.items()}
    for tensor in after.values():
        tensor[0, :3] += 0.5
    save_delta(tmp_path / "delta", before, after, {"model": str(base)})
    return tmp_path / "delta"


def test_a_whole_delta_passes(delta) -> None:
    found = verdicts(verify_delta(delta))
    assert list(found) == ["files", "values", "base", "result"]
    assert set(found.values()) == {OK}


def test_a_damaged_delta_is_found(delta) -> None:
    path = delta / "delta.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    whole = load_file(path)
    for entry, value, check in (
        ("values", torch.tensor([1.0, float("inf"), 0.0]), "values"),
        ("indices", torch.tensor([2, 1, 0], dtype=torch.int32), "values"),
        ("values", torch.tensor([1.0, 2.0, 3.0]), "result"),
    ):
        save_file({**whole, f"{name}.{entry}": value}, path)
        assert list(failed(verify_delta(delta))) == [check]


def test_a_delta_of_another_base_is_found(delta, llama, tmp_path) -> None:
    other = llama()
    torch.nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    assert list(failed(verify_delta(delta, str(tmp_path / "other")))) == ["base"]
