"""A packed base in a recipe: what is understood, what is refused, and a run to its export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sft.cli import app
from sft.errors import UserError
from sft.export.quantized import MODES
from sft.models import load_model
from sft.recipe.load import load_recipe
from sft.recipe.schema import ModelSpec, QuantizationSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
]
RECIPE = """\
model:
  name: {model}
  quantization: {quantization}
method:
  name: {method}
data:
  train: {rows}
evaluation:
  metrics: []
training:
  output_dir: {out}
  max_steps: 2
  per_device_train_batch_size: 4
  save_strategy: no
  use_cpu: true
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_folder):
    """The tiny model with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder)
    vocab = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", "a", "b", "c"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, model):
    def write(quantization="{bits: nf4}", method="s2ft\n  density: 0.1"):
        rows = tmp_path / "rows.jsonl"
        lines = [{"prompt": "a b", "completion": " c"}] * 8
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        path = tmp_path / "packed.yaml"
        path.write_text(
            RECIPE.format(
                model=model, quantization=quantization, method=method, rows=rows,
                out=tmp_path / "run",
            )
        )  # fmt: skip
        return path

    return write


def test_a_recipe_trains_and_exports_over_a_packed_base(recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    pytest.importorskip("bitsandbytes")
    run = CliRunner().invoke(app, ["train", str(recipe()), "--plain"])
    assert run.exit_code == 0, run.output
    assert "nf4 and torch.float32" in run.output
    assert "dequantize: |weight error| of 14 packed layers" in run.output
    assert "dequantize: |logit error| against the trained model" in run.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged")
    assert not getattr(merged, "is_quantized", False)
    record = json.loads((tmp_path / "run/adapter/base_quantization.json").read_text())
    assert record["quantization"]["bits"] == "nf4"
    adapter, small = str(tmp_path / "run/adapter"), str(tmp_path / "small")
    asked = ["export", adapter, "--to", "merged", "--out", small, "--quantized", "requantize"]
    export = CliRunner().invoke(app, asked)
    assert export.exit_code == 0, export.output
    assert "requantize: |weight error|" in export.output
    assert "reloaded, max |logit difference| 0" in export.output
    # packed on disk, it loads as it is, and cannot be packed again
    assert load_model(ModelSpec(name=small)).is_loaded_in_4bit
    with pytest.raises(UserError, match="is stored quantised and loads as it is"):
        load_model(ModelSpec.model_validate({"name": small, "quantization": {"bits": "int8"}}))


def sft(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_checkpoint_is_merged_over_the_base_packed_as_in_its_run(recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    saving = ["training.save_strategy=steps", "training.save_steps=2"]
    trained = sft("train", recipe(), *saving, "--plain")
    assert trained.exit_code == 0, trained.output
    export = sft("export", tmp_path / "run/checkpoint-2", "--to", "merged", "--out", tmp_path / "m")
    assert "dequantize: |weight error| of 14 packed layers" in export.output, export.output
    one, other = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("m", "run/merged"))
    assert one == other
    (tmp_path / "run/recipe.yaml").write_text("model: 3")
    damaged = sft(
        "export", tmp_path / "run/checkpoint-2", "--to", "merged", "--out", tmp_path / "n"
    )
    assert damaged.exit_code == 2 and "recipe.yaml: is damaged" in damaged.output


def test_a_run_by_forward_passes_is_replayed_over_a_packed_base(recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    method = "lora\n  r: 4\n  target_modules: all-linear\nzeroth_order: {}"
    trained = sft("train", recipe(method=method), "--plain")
    assert trained.exit_code == 0, trained.output
    merged = sft("replay", tmp_path / "run", "--to", tmp_path / "m")
    assert merged.exit_code == 2
    assert "--format: got merged, but the base is packed (nf4); take --format adapter" in (
        " ".join(merged.output.split())
    )
    adapter = sft("replay", tmp_path / "run", "--to", tmp_path / "a", "--format", "adapter")
    assert "the weights are the run's, bit for bit" in adapter.output, adapter.output
    for name in ("adapter_model.safetensors", "base_quantization.json"):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("a", "run/adapter"))
        assert one == other, name


REFUSED = {
    "unknown-bits": ("{bits: nf2}", r"quantization\.bits: got 'nf2'"),
    "unknown-key": ("{bits: nf4, double_quants: true}", "did you mean 'double_quant'"),
    "double-int8": ("{bits: int8, double_quant: true}", "double_quant: got True, which int8"),
    "int8-dtype": ("{bits: int8, compute_dtype: float32}", "compute_dtype: got float32, which"),
    "nf4-threshold": ("{bits: nf4, outlier_threshold: 3}", r"threshold: got 3\.0, which nf4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(recipe, name):
    quantization, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(recipe(quantization))
    assert "\n" not in str(caught.value)


def test_the_page_names_every_key():
    page = (Path(__file__).parents[3] / "docs/quantized.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert set(QuantizationSpec.model_fields) <= table
    modes = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert set(MODES) <= modes


def test_random_weights_are_not_packed():
    spec = {"name": "x", "config": {}, "quantization": {"bits": "nf4"}}
    with pytest.raises(ValueError, match="quantization: got random weights as well"):
        ModelSpec.model_validate(spec)


def test_without_bitsandbytes_one_line_names_the_package(monkeypatch, model):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = ModelSpec.model_validate({"name": str(model), "quantization": {"bits": "nf4"}})
    with pytest.raises(UserError, match=r'pip install "sparse-sft\[quant\]"'):
        load_model(spec)


def test_a_device_that_cannot_is_one_line(monkeypatch, model):
    from transformers import AutoModelForCausalLM

    def refuse(*args, **kwargs):
        raise RuntimeError("None of the available devices\nare supported")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    spec = ModelSpec.model_validate({"name": str(model), "quantization": {"bits": "fp4"}})
    with pytest.raises(UserError, match=r"^model\.quantization: fp4 does not load here \(None of"):
        load_model(spec)


def test_a_mode_for_a_plain_base_is_refused(model, tmp_path):
    from peft import get_peft_model

    from sft import SpielConfig
    from sft.export.adapter import export_adapter

    config = SpielConfig(density=0.1, growth="none", task_type="CAUSAL_LM")
    adapted = get_peft_model(load_model(ModelSpec(name=str(model))), config)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="--quantized: got requantize, but the base is not packed"):
        export_adapter(
            tmp_path / "adapter", base=str(model), to=tmp_path / "out", quantized="requantize"
        )
