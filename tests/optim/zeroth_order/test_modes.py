"""Displaced evaluation: the same losses in every mode, and weights that are left as they were."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._C import _len_torch_function_stack

from sft.kernels.displace import displace
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.optim.zeroth_order.exact import ExactMode
from sft.optim.zeroth_order.inplace import InplaceMode
from sft.optim.zeroth_order.reference import ReferenceMode
from sft.optim.zeroth_order.scratch import Scratch, size_of
from sft.optim.zeroth_order.trained import Trained, trained_set

DRAWS = ((1234567, -1e-2),)
IDS = torch.randint(0, 48, (2, 6), generator=torch.Generator().manual_seed(0))
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def everything(model: nn.Module, **settings) -> list[Trained]:
    return trained_set(model.named_parameters(), ZerothOrderConfig(**settings), seed=0)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def exact(model: nn.Module, trained: list[Trained]) -> ExactMode:
    return ExactMode(model, trained, "rademacher", lambda: model(IDS))


def displaced_copy(model: nn.Module, trained: list[Trained], draws) -> nn.Module:
    """The oracle: a whole second model, every weight displaced."""
    other = copy.deepcopy(model)
    parameters = dict(other.named_parameters())
    weights = [parameters[t.name].data for t in trained]
    masks = [t.mask for t in trained]
    displace(weights, [t.id for t in trained], draws, masks=masks, out=weights)
    return other


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.data.view(BITS[p.dtype]).clone() for n, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_exact_evaluates_what_a_displaced_copy_does(llama, dtype, tied, sparsity) -> None:
    model = llama(tie_word_embeddings=tied).to(dtype)
    trained = everything(model, sparsity=sparsity)
    before, pointers = bits(model), [p.data_ptr() for p in model.parameters()]
    mode = exact(model, trained)
    for draws in (DRAWS, ((1234567, 1e-2),), ((3, 0.5), (4, -0.25))):
        mode.move(draws)
        assert torch.equal(logits(model), logits(displaced_copy(model, trained, draws)))
        assert same(bits(model), before)
    mode.settle()
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    mode.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_exact_serves_conv1d_layers_and_position_tables(gpt2) -> None:
    model = gpt2(tie_word_embeddings=True)
    trained = everything(model)
    mode = exact(model, trained)
    mode.move(DRAWS)
    assert torch.equal(logits(model), logits(displaced_copy(model, trained, DRAWS)))
    assert not mode.copied


class Borrower(nn.Module):
    """Multiplies by a weight of a module that it never calls, and keeps values in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lender = nn.Linear(5, 5)
        self.table = nn.Embedding(9, 5, padding_idx=8)
        self.values = nn.ParameterDict({"default": nn.Parameter(torch.randn(5))})
        self.never = nn.Linear(5, 5)

    def forward(self, ids: torch.Tensor):
        x = self.lender(self.table(ids))
        return x @ self.lender.weight.T * self.values["default"]


def test_what_is_read_elsewhere_is_copied_whole_and_the_caller_is_told() -> None:
    model = Borrower()
    trained = everything(model)
    calls = []
    mode = ExactMode(model, trained, "rademacher", lambda: model(IDS % 9), lambda: calls.append(1))
    assert {t.name for t in mode.copied} == {"lender.weight", "values.default"}
    before = bits(model)
    mode.move(DRAWS)
    assert calls == [1]
    with torch.no_grad():
        found = model(IDS % 9)
    mode.settle()
    assert torch.equal(found, displaced_copy(model, trained, DRAWS)(IDS % 9))
    assert calls == [1, 1]
    assert same(bits(model), before)


def test_what_the_first_batch_does_not_read_is_named(caplog) -> None:
    model = Borrower()
    ExactMode(model, everything(model), "rademacher", lambda: model(IDS % 9))
    assert "does not read 2 of the trained tensors" in caplog.text
    assert caplog.text.rstrip().endswith("freeze it: never.weight, never.bias")


class SharedBias(nn.Module):
    """Holds the bias of its own child, as BERT's prediction head does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = nn.Linear(5, 9)
        self.bias = self.decoder.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x) + self.bias


class OneInTheOther(nn.Module):
    """Looks rows up inside of a module that multiplies by the very same table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 9)
        self.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.table(IDS % 9).sum()


@pytest.mark.parametrize("build", [SharedBias, OneInTheOther])
def test_a_tensor_of_a_module_and_of_its_child_is_displaced_once(build) -> None:
    model = build()
    trained = everything(model)
    x = torch.randn(3, 5 if build is SharedBias else 9)
    mode = ExactMode(model, trained, "rademacher", lambda: model(x))
    before = bits(model)
    mode.move(DRAWS)
    found = model(x)
    mode.settle()
    assert not mode.copied
    assert torch.equal(found, displaced_copy(model, trained, DRAWS)(x))
    assert same(bits(model), before)


def test_bert_is_evaluated_as_a_displaced_copy() -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    trained = everything(model)
    mode = exact(model, trained)
    mode.move(DRAWS)
    assert torch.equal(logits(model), logits(displaced_copy(model, trained, DRAWS)))


def test_an_interrupt_in_the_forward_pass_leaves_the_weights_as_they_were(llama) -> None:
    # torch calls no hook when a KeyboardInterrupt passes through a module
    model = llama()
    mode = exact(model, everything(model))
    before, pointers = bits(model), [p.data_ptr() for p in model.parameters()]

    def interrupt(*_):
        raise KeyboardInterrupt

    for inner in (model.model.layers[1].mlp.up_proj, model.model.embed_tokens):
        handle = inner.register_forward_hook(interrupt)
        inner._forward_hooks.move_to_end(handle.id, last=False)
        mode.move(DRAWS)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
        mode.settle()
        handle.remove()
        assert [p.data_ptr() for p in model.parameters()] == pointers
        assert same(bits(model), before)
        assert _len_torch_function_stack() == 0
        assert mode._scratch.mark() == 0


@pytest.mark.parametrize("build", ["exact", "inplace"])
def test_an_error_in_the_forward_pass_leaves_the_weights_as_they_were(llama, build) -> None:
    model = llama().to(torch.bfloat16)
    trained = everything(model)
    mode = exact(model, trained) if build == "exact" else InplaceMode(trained, "rademacher")
    before, pointers = bits(model), [p.data_ptr() for p in model.parameters()]

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(fail)
    mode.move(DRAWS)
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(model)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    if build == "exact":  # even before it is settled
        assert same(bits(model), before)
    mode.settle()
    handle.remove()
    mode.move(DRAWS)
    logits(model)
    mode.settle()
    assert same(bits(model), before) == (build == "exact")


def drifted(mode, weight: torch.Tensor) -> float:
    before = weight.clone()
    for coefficient in (-1e-3, 1e-3):
        mode.move(((99, coefficient),))
    mode.settle()
    return (weight != before).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_authors_cycle_does_change_weights(dtype) -> None:
    # Z5: 45 % +- 2 % of N(0, 0.02) weights; what Z4 excludes does happen
    torch.manual_seed(0)
    weight = nn.Parameter((torch.randn(400, 500) * 0.02).to(dtype))
    share = drifted(ReferenceMode([Trained("w", weight, 1)], 1e-3), weight.data)
    assert 0.43 < share < 0.47


def test_the_reference_follows_algorithm_1() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
    copies = [w.detach().clone() for w in weights]
    mode = ReferenceMode([Trained(str(i), w, i) for i, w in enumerate(weights)], 1e-2)

    def perturb(scale: float) -> None:
        torch.manual_seed(7)
        for w in copies:
            z = torch.normal(mean=0, std=1, size=w.size(), dtype=w.dtype)
            w += scale * z * 1e-2

    for draws, scale in ((((7, -1e-2),), 1), (((7, 1e-2),), -2), ((), 1)):
        mode.move(draws)
        perturb(scale)
        assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))
    mode.update(7, 0.5, [(0.1, 0.01), (0.1, 0.0)])
    torch.manual_seed(7)
    for w, decay in zip(copies, (0.01, 0.0), strict=True):
        z = torch.normal(mean=0, std=1, size=w.size(), dtype=w.dtype)
        w -= 0.1 * (0.5 * z + decay * w)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(weights, copies, strict=True))


def test_inplace_evaluates_about_the_same_and_takes_one_pass_a_move(llama, monkeypatch) -> None:
    model = llama()
    trained = everything(model)
    mode, before = InplaceMode(trained, "rademacher"), copy.deepcopy(model)
    mode.move(DRAWS)
    assert torch.equal(logits(model), logits(displaced_copy(before, trained, DRAWS)))
    mode.move(((1234567, 1e-2),))
    other = displaced_copy(before, trained, ((1234567, 1e-2),))
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-5)
    mode.settle()
    torch.testing.assert_close(logits(model), logits(before), atol=1e-5, rtol=1e-5)


def moved_set(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before != after).flatten().nonzero().flatten()


def test_the_mask_is_that_of_the_unperturbed_weights_on_both_sides(llama) -> None:
    # M5: from perturbed weights about 7 % of the selected entries would leave the mask
    model = llama()
    trained = everything(model, sparsity=0.75, eps=1e-2)
    layer, seen = model.model.layers[0].mlp.up_proj, []
    weight = layer.weight
    # registered before the mode's own hooks, so it still sees the displaced weight
    layer.register_forward_hook(lambda module, *_: seen.append(module.weight.data.clone()))
    mode = exact(model, trained)
    seen.clear()
    for sign in (-1, 1):
        mode.move(((5, sign * 1e-2),))
        logits(model)
    mode.settle()
    plus, minus = (moved_set(weight.data, other) for other in seen)
    (mask,) = (t.mask for t in trained if t.parameter is weight)
    chosen = (weight.data.abs() <= mask.threshold).flatten().nonzero().flatten()
    assert torch.equal(plus, chosen)
    assert torch.equal(minus, chosen)


def test_scratch_is_given_back_and_what_does_not_fit_has_memory_of_its_own() -> None:
    scratch = Scratch(256, torch.device("cpu"))
    outer = scratch.mark()
    first = scratch.take(torch.empty(4, 4))
    inner = scratch.mark()
    second = scratch.take(torch.empty(3, dtype=torch.bfloat16))
    third = scratch.take(torch.empty(100))
    assert second.data_ptr() == first.data_ptr() + 64
    assert third.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    scratch.release(inner)
    assert scratch.take(torch.empty(16)).data_ptr() == second.data_ptr()
    scratch.release(outer)
    assert scratch.take(torch.empty(16)).data_ptr() == first.data_ptr()
    assert size_of(torch.empty(3, dtype=torch.bfloat16)) == 64


def test_a_displaced_copy_has_the_layout_of_its_tensor() -> None:
    # another layout is another kernel, with other roundings
    plain, last = torch.empty(2, 3, 4, 5), torch.channels_last
    scratch = Scratch(2 * size_of(plain), torch.device("cpu"))
    tensors = [plain.to(memory_format=last), plain.permute(3, 0, 1, 2), plain[:, :2], plain]
    for like in tensors:  # the last one has memory of its own
        scratch.release(0)
        taken = [scratch.take(like) for _ in range(3)]
        assert {t.stride() for t in taken} == {torch.empty_like(like).stride()}
        assert taken[0].untyped_storage().data_ptr() == taken[1].untyped_storage().data_ptr()


@pytest.fixture
def peak_bytes():
    """The counter of the benchmark: torch's storages and NumPy's memory that live at once."""
    path = Path(__file__).resolve().parents[3] / "benchmarks/allocations.py"
    spec = importlib.util.spec_from_file_location("allocations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.peak_bytes


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_exact_takes_the_largest_module_beyond_inference(llama, peak_bytes, sparsity) -> None:
    # Z11; two per cent of this model are more than the buffers of the noise, 7 MiB of any model
    model = llama(tie_word_embeddings=True, vocab_size=2_000_000, hidden_size=16)
    trained = everything(model, sparsity=sparsity)
    held = sum(p.numel() * 4 for p in model.parameters())
    inference = held + peak_bytes(lambda: logits(model))
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()) * 4

    def step() -> None:
        mode = exact(model, trained)  # the scratch is made here
        for coefficient in (-1e-3, 1e-3):
            mode.move(((1, coefficient),))
            logits(model)
        mode.close()
        weights = [t.parameter.data for t in trained]
        displace(
            weights, [t.id for t in trained], DRAWS, masks=[t.mask for t in trained], out=weights
        )

    assert held + peak_bytes(step) <= 1.02 * (inference + largest) + 2**20


def test_inplace_takes_nothing_beyond_inference(llama, peak_bytes) -> None:
    model = llama(vocab_size=100_000)
    trained = everything(model)
    inference = peak_bytes(lambda: logits(model))
    mode = InplaceMode(trained, "rademacher")

    def step() -> None:
        for coefficient in (-1e-3, 1e-3):
            mode.move(((1, coefficient),))
            logits(model)
        mode.settle()

    assert peak_bytes(step) <= 1.02 * inference + 2**20
