"""A delta of a whole model (M9): what is applied has the bits of the run, or is refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.errors import UserError
from sft.export.delta import apply_delta, save_delta


def test_a_damaged_delta_is_refused(llama, tmp_path) -> None:
    model, base = llama(), llama()
    with torch.no_grad():
        model.model.norm.weight[5] = 7.0
        model.lm_head.weight.view(-1)[0] = -0.0
        base.lm_head.weight.view(-1)[0] = 0.0
    before, after = (dict(m.named_parameters()) for m in (base, model))
    assert "2 of " in save_delta(tmp_path / "d", before, after, {})
    file = tmp_path / "d/delta.safetensors"
    good = load_file(file)
    for name, tensor in (
        ("model.norm.weight.indices", torch.tensor([99], dtype=torch.int32)),
        ("model.norm.weight.values", torch.tensor([7.5])),
        ("model.norm.weight.values", torch.tensor([7.0, 7.0])),
        ("model.norm.weight.indices", torch.tensor([-1], dtype=torch.int32)),
        ("model.norm.weight.indices", torch.tensor([5.0])),
        ("model.norm.weight.values", None),
    ):
        changed = {**good, name: tensor}
        save_file({name: part for name, part in changed.items() if part is not None}, file)
        with pytest.raises(UserError, match="is damaged: it leads to other weights; write it ag"):
            apply_delta(copy.deepcopy(base), tmp_path / "d")
    save_file(good, file)
    apply_delta(base, tmp_path / "d")
    for (name, a), b in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert math.copysign(1, base.lm_head.weight.detach().view(-1)[0]) == -1
    with pytest.raises(UserError, match="is of another base"):
        apply_delta(base, tmp_path / "d")
    notes = json.loads((tmp_path / "d/delta.json").read_text())
    for content in ([], {"format": 1}, {**notes, "shapes": []}):
        (tmp_path / "d/delta.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="is no whole delta"):
            apply_delta(base, tmp_path / "d")
    (tmp_path / "d/delta.json").write_text(json.dumps(notes))
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is no whole delta"):
        apply_delta(base, tmp_path / "d")
