"""SLTrain from scratch: counts, memory, start, files, the stock model that comes out."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import sft
from sft import SLTrainConfig, pretrain_model
from sft.adapters.layer import sparse_layers

FILE = "adapter_model.safetensors"

# hidden, ffn, layers, heads, rank, density, millions of parameters: the authors' configurations
PAPER = {
    "60M": (512, 1376, 8, 8, 128, 0.03, 43.5),
    "130M": (768, 2048, 12, 12, 256, 0.03, 96.5),
    "350M": (1024, 2736, 24, 16, 256, 0.03, 194.3),
    "1B": (2048, 5461, 24, 32, 512, 0.03, 645.5),
    "7B": (4096, 11008, 32, 32, 1024, 0.05, 3144.7),
}


def tiny(**changes) -> LlamaConfig:
    fields = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(fields | changes))


def gpt2_config() -> GPT2Config:
    return GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=32)


@pytest.fixture
def randomize():
    """Give everything random values, as training would."""

    def fill(model) -> None:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))

    return fill


@pytest.fixture
def batch():
    ids = torch.randint(48, (3, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def method():
    return SLTrainConfig(r=4, alpha=8, density=0.1)


@pytest.mark.parametrize("size", PAPER)
def test_fact21_counts_of_the_papers_models(size) -> None:
    hidden, ffn, depth, heads, rank, density, millions = PAPER[size]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=depth,
        num_attention_heads=heads,
    )
    model = pretrain_model(config, SLTrainConfig(r=rank, density=density), device="meta")
    trained, everything = model.get_nb_trainable_parameters()
    assert trained == everything
    assert round(trained / 1e6, 1) == millions


@pytest.mark.parametrize("config", [tiny(), gpt2_config()], ids=["llama", "gpt2"])
def test_it_starts_as_the_paper_says(config, method, batch) -> None:
    model = pretrain_model(config, method, seed=1)
    for layer in sparse_layers(model).values():
        bound = 1 / layer.in_features**0.5
        values, a = layer.sltrain_values["default"], layer.sltrain_a["default"]
        assert not layer.sltrain_b["default"].any()
        for part in (values, a):
            assert 0.9 * bound < part.abs().max() <= bound
        assert layer.get_base_layer().weight.numel() == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert 3.5 < model(**batch).loss < 4.5  # log 48 = 3.87


def test_everything_trains(method, batch) -> None:
    model = pretrain_model(tiny(), method)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        # B = 0 hides A from the first gradient; a weight that is gone has no entries
        if parameter.numel() and "sltrain_a" not in name:
            assert parameter.requires_grad, name
            assert parameter.grad.any(), name


class Written(TorchDispatchMode):
    """Bytes of the largest tensor that was written to; `empty` reserves addresses, not memory."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.empty.memory_format:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                    self.largest = max(self.largest, leaf.numel() * leaf.element_size())
        return out


def test_no_dense_matrix_is_ever_in_memory(method) -> None:
    config = tiny(hidden_size=64, intermediate_size=4096)
    with Written() as written:
        model = pretrain_model(config, method)
    assert written.largest < 4096 * 64 * 4
    held = sum(p.numel() for p in model.parameters())
    assert held == model.get_nb_trainable_parameters()[0] < 0.5 * 2 * 3 * 4096 * 64


def test_fact22_the_seed_gives_the_model(method, batch) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (pretrain_model(tiny(), method, seed=s).eval() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one(**batch).logits, two(**batch).logits)
    assert not torch.equal(one(**batch).logits, other(**batch).logits)
    assert one.peft_config["default"].seed == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kernel", ["compose", "factored"])
def test_fact23_the_exported_model_is_stock(method, batch, randomize, tmp_path, tied, kernel):
    method.kernel = kernel
    model = pretrain_model(tiny(tie_word_embeddings=tied), method).eval()
    randomize(model)
    expected = model(**batch).logits
    merged = model.merge_and_unload()
    kinds = {type(m) for m in merged.modules() if "proj" in str(type(m)) or hasattr(m, "weight")}
    assert not any("SLTrain" in kind.__name__ for kind in kinds)
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(stock.model.layers[0].self_attn.q_proj, nn.Linear)
    torch.testing.assert_close(stock(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what it does itself
@pytest.mark.parametrize("kernel", ["compose", "factored"])
def test_compiled_gradients_are_those_of_eager(method, batch, randomize, kernel) -> None:
    method.kernel = kernel
    model = pretrain_model(tiny(), method)
    randomize(model)

    def gradients(forward) -> dict[str, torch.Tensor]:
        model.zero_grad()
        forward(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.numel()}

    expected, compiled = gradients(model), torch.compile(model, backend="eager")
    for _ in range(2):
        for name, found in gradients(compiled).items():
            torch.testing.assert_close(found, expected[name], msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_low_memory_loading_gives_the_same(
    method, batch, randomize, tmp_path, tied, trainable
) -> None:
    config = tiny(tie_word_embeddings=tied)
    model = pretrain_model(config, method).eval()
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    model.to(torch.float32)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_config(config),
        tmp_path,
        low_cpu_mem_usage=True,
        is_trainable=trainable,
    ).eval()
    inner = loaded.get_base_model()
    assert (inner.lm_head.weight is inner.model.embed_tokens.weight) == tied
    assert inner.lm_head.weight.dtype == torch.float32
    assert all(p.requires_grad == trainable for p in loaded.parameters() if p.numel())
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_holds_everything(method, batch, randomize, tmp_path, tied) -> None:
    config = tiny(tie_word_embeddings=tied)
    model = pretrain_model(config, method).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / FILE)
    trained = model.get_nb_trainable_parameters()[0]
    assert sum(t.numel() for t in held.values() if t.is_floating_point()) == trained
    again = pretrain_model(config, method, seed=0)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    base = AutoModelForCausalLM.from_config(config)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for other in (again.eval(), loaded.eval()):
        assert torch.equal(other(**batch).logits, model(**batch).logits)
    assert all(p.requires_grad for p in again.parameters() if p.numel())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_file_of_another_size_is_refused(method, tmp_path) -> None:
    pretrain_model(tiny(), method).save_pretrained(tmp_path)
    for changes in ({"vocab_size": 50}, {"num_hidden_layers": 3}, {"hidden_size": 48}):
        with pytest.raises(ValueError, match=r"^adapter file: "):
            pretrain_model(tiny(**changes), method).load_adapter(tmp_path, "default")


def test_merging_can_be_undone(method, batch, randomize) -> None:
    model = pretrain_model(tiny(), method).eval()
    randomize(model)
    expected = model(**batch).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(**batch).logits, expected)


def test_resident_mode_changes_nothing(method, batch) -> None:
    model = pretrain_model(tiny(), method).eval()
    expected = model(**batch).logits
    with sft.resident(model):
        assert torch.equal(model(**batch).logits, expected)


def test_half_precision_keeps_float32_parts(method, batch) -> None:
    model = pretrain_model(tiny(), method, dtype=torch.bfloat16)
    dtypes = {
        n.split(".")[-2] if "sltrain" in n else n: p.dtype for n, p in model.named_parameters()
    }
    assert dtypes["sltrain_a"] == dtypes["sltrain_values"] == torch.float32
    assert model(**batch).logits.dtype == torch.bfloat16
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_a_dense_model_gives_its_weights_up(llama, batch) -> None:
    model = get_peft_model(llama(), SLTrainConfig(form="pretrain", r=4, task_type="CAUSAL_LM"))
    assert all(la.get_base_layer().weight.numel() == 0 for la in sparse_layers(model).values())
    assert torch.isfinite(model(**batch).loss)


def test_what_it_has_no_base_for_is_refused(method, batch, llama) -> None:
    model = pretrain_model(tiny(), method)
    with pytest.raises(ValueError, match=r"^form: 'pretrain' has no base to unload"):
        model.unload()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"^form: 'pretrain' has no base"):
        model(**batch)
    with pytest.raises(ValueError, match=r"^form: .* has no weight but that of its 'pretrain'"):
        model.add_adapter("second", SLTrainConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"^adapter_names: form='pretrain' has one adapter"):
        model.eval()(**batch, adapter_names=["default"] * 3)
    beside = get_peft_model(llama(), SLTrainConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"^form: 'pretrain' cannot replace"):
        beside.add_adapter("second", SLTrainConfig(r=4, form="pretrain", task_type="CAUSAL_LM"))
