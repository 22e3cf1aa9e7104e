"""Sparse deltas as adapters of stock PEFT's SHiRA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sft
from sft.errors import UserError
from sft.export.merged import logits_of
from sft.export.shira import filled
from sft.export.stock import export_adapter_as_shira
from sft.tools.change import Change

TASK = {"task_type": "CAUSAL_LM"}
BATCH = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]])}
CONFIGS = {
    "spiel": lambda: sft.SpielConfig(density=0.07, **TASK),
    "s2ft": lambda: sft.S2FTConfig(density=0.1, **TASK),
    "head": lambda: sft.SpielConfig(num_weights=50, modules_to_save=["lm_head"], **TASK),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("method", CONFIGS)
def test_stock_peft_loads_it(byte_base, adapter_on, tmp_path, method) -> None:
    adapter = adapter_on(byte_base, CONFIGS[method]())
    counts, difference = export_adapter_as_shira(adapter, base=None, to=tmp_path / "shira")
    assert difference is not None and difference < 1e-5
    assert PeftConfig.from_pretrained(tmp_path / "shira").peft_type.value == "SHIRA"
    load = AutoModelForCausalLM.from_pretrained
    ours = PeftModel.from_pretrained(load(byte_base), adapter)
    theirs = PeftModel.from_pretrained(load(byte_base), tmp_path / "shira")
    torch.testing.assert_close(logits_of(theirs, [BATCH]), logits_of(ours, [BATCH]))
    for name, layer in ours.base_model.adapted_layers("default").items():
        other = theirs.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default")
        assert torch.equal(other.get_delta_weight("default").to_dense(), delta)
        assert counts[name] == layer.trained_values["default"].numel()


def test_a_process_without_this_library_loads_it(byte_base, adapter_on, tmp_path) -> None:
    adapter = adapter_on(byte_base, CONFIGS["spiel"]())
    export_adapter_as_shira(adapter, base=None, to=tmp_path / "shira", verify=False)
    script = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM as A"
        f"; m = PeftModel.from_pretrained(A.from_pretrained({str(byte_base)!r}), "
        f"{str(tmp_path / 'shira')!r}); assert m.peft_type == 'SHIRA'; print('sft' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.split() == ["False"], ran.stderr


def test_values_may_be_of_16_bits(byte_base, adapter_on, tmp_path) -> None:
    adapter = adapter_on(byte_base, CONFIGS["spiel"]())
    export_adapter_as_shira(adapter, base=None, to=tmp_path / "shira", dtype="bfloat16")
    tensors = load_file(tmp_path / "shira/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.int32, torch.bfloat16}


def test_missing_values_are_zeros_at_free_positions() -> None:
    change = Change((3, 4), torch.tensor([5.0, 6.0]), torch.tensor([1, 10]), 2)
    positions, values = filled("m", change, 7)
    assert positions.tolist() == [[0, 0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 0, 1, 2]]
    assert values.tolist() == [0, 5, 0, 0, 0, 0, 6]
    with pytest.raises(UserError, match=r"m of shape \(3, 4\) has fewer than the 13 values"):
        filled("m", change, 13)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_dense_deltas_and_other_layers_are_refused(byte_base, adapter_on, tmp_path) -> None:
    to = tmp_path / "shira"
    sora = adapter_on(byte_base, sft.SoRAConfig(r=2, **TASK), name="sora")
    with pytest.raises(UserError, match=r"q_proj carries a dense delta, allowed are sparse ones"):
        export_adapter_as_shira(sora, base=None, to=to)
    config = sft.SpielConfig(density=0.1, target_modules=["embed_tokens"], **TASK)
    untied = tmp_path / "untied"
    model = AutoModelForCausalLM.from_pretrained(byte_base, tie_word_embeddings=False)
    model.save_pretrained(untied)
    tables = adapter_on(untied, config, name="tables")
    with pytest.raises(UserError, match=r"is a Embedding, allowed is nn\.Linear; use --to merged"):
        export_adapter_as_shira(tables, base=None, to=to)
    assert not to.exists()
