"""Adapters that were trained over packed weights, in every form that sft export writes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft import S2FTConfig, SpielConfig
from sft.errors import UserError
from sft.export.forms import Request, export
from sft.export.patch import read_patches
from sft.quantization import write_record
from sft.recipe.schema import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
NF4 = {"bits": "nf4"}


def quiet(_: str) -> None:
    pass


@pytest.fixture
def adapter(lab):
    """Save an adapter as a run over a base in 4 bits does."""
    config = SpielConfig(density=0.05, task_type="CAUSAL_LM")
    model = lab.adapt(lab.packed(NF4), config, moved=0.02)
    model.save_pretrained(lab.out / "adapter")
    write_record(lab.out / "adapter", ModelSpec.model_validate({"name": "x", "quantization": NF4}))
    return lab.out / "adapter"


def test_a_sparse_delta_is_a_shira_over_the_same_packed_base(lab, adapter) -> None:
    line = export(adapter, "shira", Request(to=lab.out / "shira", base=str(lab.folder)), quiet)
    assert "loaded by stock PEFT, max |logit difference|" in line


def test_a_patch_is_of_the_base_as_it_was(lab, adapter) -> None:
    to, base = lab.out / "patch", str(lab.folder)
    with pytest.raises(UserError, match=r"packed in nf4, .*pass --quantized reference"):
        export(adapter, "patch", Request(to=to, base=base), quiet)
    assert not to.exists()
    line = export(adapter, "patch", Request(to=to, base=base, quantized="reference"), quiet)
    assert line.endswith("applied to the base, max |logit difference| 0")
    assert all(patch.indices is not None for patch in read_patches(to))


def test_merged_is_what_was_unpacked_unless_told(lab, adapter) -> None:
    said: list[str] = []
    base = str(lab.folder)
    export(adapter, "merged", Request(to=lab.out / "m", base=base), said.append)
    assert any(line.startswith("dequantize: |weight error|") for line in said)
    merged = AutoModelForCausalLM.from_pretrained(lab.out / "m").state_dict()
    found = lab.reference().state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((merged[name] != found[name]).float().mean()) > 0.9


def test_slices_over_packed_weights_are_loras(lab) -> None:
    config = S2FTConfig(density=0.1, task_type="CAUSAL_LM")
    model = lab.adapt(lab.packed(NF4), config, moved=0.02)
    model.save_pretrained(lab.out / "s2ft")
    write_record(lab.out / "s2ft", ModelSpec.model_validate({"name": "x", "quantization": NF4}))
    line = export(lab.out / "s2ft", "lora", Request(to=lab.out / "l", base=str(lab.folder)), quiet)
    assert "loaded by stock PEFT" in line and torch.isfinite(
        torch.tensor(float(line.rpartition(" ")[2]))
    )
