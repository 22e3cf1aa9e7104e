"""Adapters of low rank as stock PEFT LoRAs: same logits, ranks as counted, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import sft
from sft.errors import UserError
from sft.export.lora import export_lora
from sft.export.low_rank import Approximation, nearest
from sft.export.merged import check_equal
from sft.export.stock import export_adapter_as_lora

IDS = torch.randint(3, 48, (3, 9), generator=torch.Generator().manual_seed(4))


def pruned(base, share=0.5, targets="all-linear", r=4, **fields):
    """A SoRA adapter with random B and a random share of closed gates."""
    config = sft.SoRAConfig(r=r, alpha=8, target_modules=targets, init_weights=False, **fields)
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.base_model.adapted_layers("default").values():
            gate = layer.sora_gate["default"]
            gate[torch.rand(r, generator=generator) < share] = 0
    return model


@pytest.fixture
def randomize():
    def fill(model):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))

    return fill


def open_ranks(model) -> dict[str, int]:
    layers = model.base_model.adapted_layers("default")
    found = {n: int(layer.sora_gate["default"].count_nonzero()) for n, layer in layers.items()}
    return {name: rank for name, rank in found.items() if rank}


def lora_ranks(model) -> dict[str, int]:
    return {
        name: module.r["default"]
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


@torch.no_grad()
def logits(model, **more):
    return model(input_ids=IDS, **more).logits


def close(mine, truth) -> None:
    torch.testing.assert_close(mine, truth, rtol=0, atol=1e-5 * float(truth.detach().abs().max()))


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_s7_stock_peft_loads_mixed_ranks(request, tmp_path, kind, share) -> None:
    build = request.getfixturevalue(kind)
    model = pruned(build(), share)
    expected, ranks = logits(model), open_ranks(model)
    assert len(set(ranks.values())) > 1 and len(ranks) <= len(
        model.base_model.adapted_layers("default")
    )
    assert export_lora(model, tmp_path / "lora").ranks == ranks
    assert torch.equal(logits(model), expected)
    loaded = PeftModel.from_pretrained(build(), tmp_path / "lora")
    assert lora_ranks(loaded) == ranks
    close(logits(loaded), expected)
    close(logits(loaded.merge_and_unload()), expected)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert all(key.startswith("^") for key in config["rank_pattern"])
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert len(tensors) == 2 * len(ranks)
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_s8_merged_and_uniform_equal_the_pattern(llama, tmp_path) -> None:
    model = pruned(llama(), 0.6)
    expected, ranks = logits(model), open_ranks(model)
    found = export_lora(model, tmp_path / "lora", uniform_rank=True).ranks
    assert found == dict.fromkeys(ranks, max(ranks.values()))
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    close(logits(loaded), expected)
    close(logits(model.merge_and_unload()), expected)


def test_s9_keys_are_anchored(tmp_path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    def base():
        torch.manual_seed(0)
        sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 12}
        config = BartConfig(
            vocab_size=48, d_model=32, encoder_attention_heads=2, decoder_attention_heads=2,
            decoder_layers=2, max_position_embeddings=32, **sizes,
        )  # fmt: skip
        return BartForConditionalGeneration(config).eval()

    model = pruned(base(), 0.5, ["self_attn.q_proj", "fc1"], r=6)
    ranks, expected = open_ranks(model), logits(model)
    for deeper in ("encoder.layers.11.", "decoder.layers.1."):
        names = {n: n.replace("encoder.layers.1.", deeper) for n in ranks if "r.layers.1." in n}
        assert any(ranks[n] != ranks.get(other) for n, other in names.items())
    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert lora_ranks(loaded) == ranks
    close(logits(loaded), expected)


class Twice(nn.Module):
    """A target whose name is the end of another module's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.aux = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})

    def forward(self, x):
        return self.aux["layers"][0](self.layers[1](self.layers[0](x)))


def test_a_name_that_ends_another_one_is_written_as_an_expression(tmp_path) -> None:
    model = pruned(Twice(), 0.3, r"layers\.[01]")
    x = torch.randn(3, 8)
    ranks = open_ranks(model)
    assert set(ranks) == {"layers.0", "layers.1"}
    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(Twice(), tmp_path / "lora")
    assert lora_ranks(loaded) == ranks
    close(loaded(x), model(x))


def test_heads_come_along(llama, tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def base():
        torch.manual_seed(0)
        fields = llama().config.to_dict() | {"num_labels": 3, "pad_token_id": 0}
        return LlamaForSequenceClassification(LlamaConfig(**fields)).eval()

    model = pruned(base(), task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.mul_(3)
    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora")
    close(logits(loaded), logits(model))


def test_a_type_for_the_factors(llama, tmp_path) -> None:
    model = pruned(llama())
    export_lora(model, tmp_path / "lora", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0.05, atol=0.02)


def test_slices_of_s2ft_are_low_rank_too(llama, tmp_path, randomize) -> None:
    config = sft.S2FTConfig(density=0.2, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).eval()
    randomize(model)
    ranks = export_lora(model, tmp_path / "lora").ranks
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    assert lora_ranks(loaded) == ranks
    close(logits(loaded), logits(model))


def test_what_has_no_rank_is_refused_in_one_line(llama, tmp_path) -> None:
    nothing = pruned(llama(), share=2.0)
    with pytest.raises(UserError, match=r"^--to lora: all 14 modules have rank 0") as caught:
        export_lora(nothing, tmp_path / "lora")
    assert "\n" not in str(caught.value)
    base = llama()
    config = sft.SpielConfig(density=0.1, target_modules=["embed_tokens"])
    with pytest.raises(UserError, match=r"a Embedding, is not linear; use --to merged"):
        export_lora(get_peft_model(base, config), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def spiel(base, randomize, targets="all-linear"):
    config = sft.SpielConfig(density=0.1, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sparse_delta_is_rounded_to_its_nearest_rank_and_the_error_is_told(
    request, tmp_path, randomize, kind
) -> None:
    build = request.getfixturevalue(kind)
    model = spiel(build(), randomize)
    done = export_lora(model, tmp_path / "lora", approximation=Approximation(0.4, max_rank=22))
    loaded = PeftModel.from_pretrained(build(), tmp_path / "lora")
    theirs = loaded.base_model.model
    assert done.errors.keys() == model.base_model.adapted_layers("default").keys()
    for name, layer in model.base_model.adapted_layers("default").items():
        delta = layer.get_delta_weight("default").detach()
        off = theirs.get_submodule(name).get_delta_weight("default") - delta
        assert float(off.norm() / delta.norm()) == pytest.approx(done.errors[name], abs=1e-5)
        assert 0.2 < done.errors[name] <= 0.4
    line = done.lines()[0]
    assert line.startswith(f"{next(iter(done.errors))}: rank ") and "error 0." in line
    written = json.loads((tmp_path / "lora/lora_error.json").read_text())
    assert written == pytest.approx(done.errors)


def test_too_large_an_error_is_refused_with_the_rank_that_would_do(llama, tmp_path, randomize):
    model = spiel(llama(), randomize)
    message = (
        r"--max-error: model\.layers\.0\.\S+ is 0\.\d+ away from rank 2, allowed is 0\.05, which "
        r"takes rank \d+ of 32; raise --rank"
    )
    with pytest.raises(UserError, match=message):
        export_lora(model, tmp_path / "lora", approximation=Approximation(max_rank=2))
    assert list(tmp_path.iterdir()) == []
    for options, message in (((1.0, 4), "--max-error: got 1.0"), ((0.1, 0), "--rank: got 0")):
        with pytest.raises(UserError, match=message):
            Approximation(*options)


def test_the_nearest_product_is_the_best_and_the_smallest() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(20, 30, generator=generator)
    factors, error, needed = nearest(delta, 0.5, 100)
    assert factors.rank == needed and error <= 0.5
    off = float((delta - factors.b @ factors.a).norm() / delta.norm())
    assert off == pytest.approx(error, abs=1e-6)
    assert nearest(delta, 0.5, needed - 1)[1] > 0.5
    assert nearest(delta, 0.5, needed - 1)[2] == needed
    exact = torch.randn(20, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    done, error = Approximation(0.3).apply("m", exact)
    assert done.rank == 3 and error < 1e-5
    assert nearest(torch.zeros(4, 5), 0.1, 3)[0].rank == 0


def test_adapters_of_stock_peft_become_plain_loras_too(llama, tmp_path, randomize) -> None:
    from peft import LoHaConfig, LoraConfig

    config = LoHaConfig(r=2, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(llama(), config).eval()
    randomize(model)
    done = export_lora(model, tmp_path / "lora")
    assert set(done.ranks.values()) == {4} and max(done.errors.values()) < 1e-5
    close(logits(PeftModel.from_pretrained(llama(), tmp_path / "lora")), logits(model))
    scaled = get_peft_model(llama(), LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"q_proj, a Linear, has no plain delta; use --to merged"):
        export_lora(scaled, tmp_path / "dora")


def test_a_wrong_lora_fails_and_takes_no_name(llama, tmp_path) -> None:
    model = pruned(llama())

    def check(path):
        found = [logits(PeftModel.from_pretrained(llama(), path))]
        check_equal(found, [logits(model) + 1], bound=1e-3, what="the LoRA")

    with pytest.raises(UserError, match=r"the LoRA is not the trained model: max"):
        export_lora(model, tmp_path / "lora", check=check)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uniform", [False, True])
def test_the_command_writes_and_checks(tiny_model, tiny_tokenizer, tmp_path, uniform) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from typer.testing import CliRunner

    from sft.cli import app

    model = pruned(AutoModelForCausalLM.from_pretrained(tiny_model), 0.6, task_type="CAUSAL_LM")
    saved, to = tmp_path / "adapter", tmp_path / "lora"
    model.save_pretrained(saved)
    tiny_tokenizer.save_pretrained(saved)
    command = ["export", saved, "--base", tiny_model, "--to", "lora", "--out", to]
    options = ["--uniform-rank"] if uniform else []
    result = CliRunner().invoke(app, [str(word) for word in [*command, *options]])
    assert result.exit_code == 0, result.output
    ranks = open_ranks(model).values()
    low = max(ranks) if uniform else min(ranks)
    shown = f"{len(ranks)} modules of rank {low} to {max(ranks)};"
    assert shown in result.output and "loaded by stock PEFT" in result.output
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), to)
    ids = {"input_ids": torch.tensor([[3, 4, 5]])}
    close(loaded(**ids).logits, model(**ids).logits)
    assert AutoTokenizer.from_pretrained(to).vocab_size == tiny_tokenizer.vocab_size
    done, difference = export_adapter_as_lora(
        saved, base=str(tiny_model), to=to, uniform_rank=uniform, overwrite=True
    )
    assert difference is not None
    assert set(done.ranks) == set(open_ranks(model)) and difference < 1e-4
    again = CliRunner().invoke(app, [str(word) for word in command])
    assert again.exit_code == 2 and "is not empty" in again.output
