"""Every layer whose input can be kept in fewer bits: gradients, sharing, recomputation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sft.kernels import kept, outer
from sft.kernels.composed_linear import composed_linear
from sft.kernels.factored_linear import factored_linear
from sft.kernels.kept import form_in, keep, restore
from sft.kernels.slice_linear import resident_slice_linear, slice_linear
from sft.kernels.sparse_linear import delta_linear, resident_linear

IN, OUT, K, RANK = 48, 40, 30, 3
FORMS = ["int8", "bfloat16"]
Layer = Callable[..., Tensor]


def resident(x: Tensor, part: dict[str, Tensor], site: Any, form: str) -> Tensor:
    y = resident_linear(
        x, part["weight"], None, part["values"], site, conv1d=False, saved_inputs=form
    )
    return y


def delta(x: Tensor, part: dict[str, Tensor], site: Any, form: str) -> Tensor:
    return delta_linear(x, part["values"], site, conv1d=False, saved_inputs=form)


def factored(x: Tensor, part: dict[str, Tensor], site: Any, form: str) -> Tensor:
    return factored_linear(x, part["a"], part["b"], part["values"], 0.5, site, saved_inputs=form)


def composed(x: Tensor, part: dict[str, Tensor], site: Any, form: str) -> Tensor:
    return composed_linear(x, part["a"], part["b"], part["values"], 0.5, site, saved_inputs=form)


class Slice:
    """Some inputs or outputs of a layer."""

    start, stamp = None, 0

    def __init__(self, side: str) -> None:
        self.side, self.indices = side, torch.tensor([1, 5, 6, 30])


def sliced_in(x: Tensor, part: dict[str, Tensor], _: Any, form: str) -> Tensor:
    return slice_linear(x, part["columns"], Slice("in"), out_features=OUT, saved_inputs=form)


def sliced_out(x: Tensor, part: dict[str, Tensor], _: Any, form: str) -> Tensor:
    return slice_linear(x, part["rows"], Slice("out"), out_features=OUT, saved_inputs=form)


def resident_out(x: Tensor, part: dict[str, Tensor], _: Any, form: str) -> Tensor:
    return resident_slice_linear(
        x, part["weight"], None, part["rows"], Slice("out"), conv1d=False, saved_inputs=form
    )


LAYERS = {f.__name__: f for f in (resident, delta, factored, composed)}
SLICES = {f.__name__: f for f in (sliced_in, sliced_out, resident_out)}


def parts(layer: Layer) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {"weight": torch.randn(OUT, IN)}
    if layer.__name__ in LAYERS:
        made["values"] = torch.randn(K).requires_grad_()
    if layer in (factored, composed):
        made["a"] = torch.randn(RANK, IN).requires_grad_()
        made["b"] = torch.randn(OUT, RANK).requires_grad_()
    if layer is sliced_in:
        made["columns"] = torch.randn(4, OUT).requires_grad_()
    if layer in (sliced_out, resident_out):
        made["rows"] = torch.randn(4, IN).requires_grad_()
    return made


def trained(part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in part.items() if t.requires_grad}


@pytest.fixture
def site(make_pattern, make_site) -> Any:
    return make_site(make_pattern(OUT, IN, K))


@pytest.mark.parametrize("limit", [1.0, -1], ids=["sampled", "row blocks"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_gradients_are_those_of_the_restored_input(
    layer: Layer, form: str, limit: float, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the output and the gradient of the input are not touched at all."""
    monkeypatch.setattr("sft.kernels.outer_at.SAMPLED_UP_TO", {"cpu": limit})
    x, seed = torch.randn(2, 7, IN), torch.randn(2, 7, OUT)

    def gradients(x: Tensor, form: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        part = parts(layer)
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        y = layer(leaf, part, site, form)
        y.backward(seed)
        return y.detach(), leaf.grad, {name: t.grad for name, t in trained(part).items()}

    torch.manual_seed(5)
    close = restore(keep(x, form), torch.float32)
    assert not torch.equal(close, x)
    y, dx, found = gradients(x, form)
    wanted_y, wanted_dx, full = gradients(x, "full")
    assert torch.equal(y, wanted_y)
    assert torch.equal(dx, wanted_dx)
    _, _, wanted = gradients(close, "full")
    for name in {"values", "a"} & set(found):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)
        assert not torch.equal(found[name], full[name])
    if "b" in found and layer is factored:  # x A^T is saved as it is
        assert torch.equal(found["b"], full["b"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", SLICES.values(), ids=SLICES)
def test_gradients_of_slices_are_those_of_the_restored_input(layer: Layer, form: str) -> None:
    x, seed = torch.randn(2, 32, IN), torch.randn(2, 32, OUT)
    read = x[..., Slice("in").indices] if layer is sliced_in else x
    torch.manual_seed(5)
    close = x.clone()
    restored = restore(keep(read, form), torch.float32)
    if layer is sliced_in:
        close[..., Slice("in").indices] = restored
    else:
        close = restored
    found = {}
    for name, given, how in (("kept", x, form), ("wanted", close, "full"), ("full", x, "full")):
        part = parts(layer)
        torch.manual_seed(5)
        layer(given, part, None, how).backward(seed)
        (values,) = trained(part).values()
        found[name] = values.grad
    torch.testing.assert_close(found["kept"], found["wanted"], rtol=1e-5, atol=1e-5)
    assert not torch.equal(found["kept"], found["full"])


@pytest.mark.parametrize("layer", SLICES.values(), ids=SLICES)
def test_of_a_slice_its_inputs_alone_are_saved_and_in_few_bits(layer: Layer) -> None:
    x, part, saved = torch.randn(64, IN), parts(layer), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x * 2, part, None, "int8")
    (codes,) = (t for t in saved if t.dtype == torch.int8)
    assert codes.numel() == 64 * (4 if layer is sliced_in else IN)
    assert not [t for t in saved if t.dtype == torch.float32 and len(t) == 64]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_input_itself_is_not_saved(layer: Layer, form: str, site: Any) -> None:
    x, part, saved = torch.randn(64, IN), parts(layer), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x * 2, part, site, form)
    sizes = [t.nbytes for t in saved if t.numel() == x.numel()]
    assert sizes == [x.numel() * {"int8": 1, "bfloat16": 2}[form]]


@pytest.mark.parametrize(
    "layer", [resident, factored, sliced_out], ids=["resident", "factored", "sliced_out"]
)
def test_readers_of_one_input_share_one_copy(
    layer: Layer, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(outer, "keep", lambda x, form: calls.append(form) or keep(x, form))
    x, saved = torch.randn(64, IN) * 2, []
    readers = [parts(layer) for _ in range(3)]
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = [layer(x, part, site, "int8") for part in readers]
        other = layer(x.clone(), parts(layer), site, "int8")
    assert calls == ["int8", "int8"]
    assert len({t.data_ptr() for t in saved if t.dtype == torch.int8}) == 2
    sum(y.square().sum() for y in outputs).backward()
    for part in readers[1:]:
        for name, value in trained(part).items():
            assert torch.equal(value.grad, readers[0][name].grad)
    assert other.requires_grad


def test_an_input_that_changed_in_place_is_kept_anew(site: Any) -> None:
    x, first, second, plain = torch.randn(64, IN), parts(resident), parts(resident), parts(resident)
    y = resident(x, first, site, "int8")
    x.mul_(-3.0)
    resident(x, second, site, "int8").square().sum().backward()
    resident(x.clone(), plain, site, "full").square().sum().backward()
    assert y.requires_grad
    error = (second["values"].grad - plain["values"].grad).norm()
    assert error < 0.05 * plain["values"].grad.norm()


def test_a_reader_in_another_dtype_keeps_a_copy_of_its_own(site: Any) -> None:
    x, first, second, plain = torch.randn(64, IN), parts(resident), parts(resident), parts(resident)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        y = resident(x, first, site, "int8")
    z = resident(x, second, site, "int8")
    (y.float().sum() + z.sum()).backward()
    torch.manual_seed(5)
    kept.pass_over()
    resident(x.clone(), plain, site, "int8").sum().backward()
    assert torch.equal(second["values"].grad, plain["values"].grad)


def test_a_reader_in_full_is_given_the_input_itself(site: Any) -> None:
    x = torch.randn(8, IN)
    first, second, plain = (parts(resident) for _ in range(3))
    resident(x, first, site, "int8").sum().backward()
    y, z = resident(x, second, site, "full"), resident(x, first, site, "int8")
    y.sum().backward()
    resident(x.clone(), plain, site, "full").sum().backward()
    assert z.requires_grad
    assert torch.equal(second["values"].grad, plain["values"].grad)


def test_the_copy_goes_with_the_graph(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing holds it once the input is gone and backward is done, or never comes."""
    made = []

    def watched(x: Tensor, form: str) -> Any:
        found = keep(x, form)
        made.append(weakref.ref(found.codes))
        return found

    monkeypatch.setattr(outer, "keep", watched)
    x = torch.randn(8, IN)
    y = resident(x, parts(resident), site, "int8")
    del x
    gc.collect()
    assert made[0]() is not None
    y.sum().backward()
    gc.collect()
    assert made[0]() is None
    y = resident(torch.randn(8, IN), parts(resident), site, "int8")
    del y
    gc.collect()
    assert made[1]() is None


def test_saved_elsewhere_it_is_not_held_here(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by checkpointing and offloading, which take what is saved out of the graph."""
    made = []

    def watched(x: Tensor, form: str) -> Any:
        found = keep(x, form)
        made.append(weakref.ref(found.codes))
        return found

    monkeypatch.setattr(outer, "keep", watched)
    with saved_tensors_hooks(lambda t: None, lambda _: None):
        y = resident(torch.randn(8, IN), parts(resident), site, "int8")
    gc.collect()
    assert made[0]() is None
    assert y.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_recomputation_gives_the_same_bits(form: str, reentrant: bool, site: Any) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        readers = [parts(resident) for _ in range(2)]
        torch.manual_seed(3)
        x = torch.randn(8, IN, requires_grad=True)

        def block(x: Tensor) -> Tensor:
            # rounded in a layer before: later draws depend on how many there were
            h = x * 2
            total = sum(resident(h, part, site, form) for part in readers)
            return resident(torch.nn.functional.pad(total.tanh() * 3, (0, 8)), last, site, form)

        last = parts(resident)
        y = checkpoint(block, x, use_reentrant=reentrant) if recompute else block(x)
        y.square().sum().backward()
        return [x.grad, *(part["values"].grad for part in (*readers, last))]

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, wanted)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "made in the block": lambda x: x * 2,
    "of the block": lambda x: x,
    "kept by its maker": torch.tanh,
    "half": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_dropout_after_readers_is_recomputed_as_it_was(
    make: Callable[[Tensor], Tensor], form: str, frozen: bool, reentrant: bool, site: Any
) -> None:
    readers, masks = [parts(resident) for _ in range(3)], []
    readers[1]["values"].requires_grad_(not frozen)

    def block(x: Tensor) -> Tensor:
        h = make(x)
        for part in readers:
            wanted = form_in(form, part["values"], training=True)
            masks.append(torch.nn.functional.dropout(resident(h, part, site, wanted), 0.5) != 0)
        return masks[-1] * resident(h, readers[0], site, "full")

    x = torch.randn(8, IN, requires_grad=True)
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert len(masks) == 6
    assert all(map(torch.equal, masks[:3], masks[3:]))


def test_of_an_input_that_lives_nothing_is_held_past_its_readers(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint holds the inputs of its blocks."""
    made = []

    def watched(x: Tensor, form: str) -> Any:
        found = keep(x, form)
        made.append(weakref.ref(found.codes))
        return found

    monkeypatch.setattr(outer, "keep", watched)
    inputs, outputs = [torch.randn(8, IN) for _ in range(3)], []
    with saved_tensors_hooks(lambda t: None, lambda _: None):
        outputs += [resident(x, parts(resident), site, "int8") for x in inputs]
    assert [found() is None for found in made] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_held_by_what_would_keep_it(site: Any, dtype: torch.dtype) -> None:
    part = {name: t.detach().to(dtype) for name, t in parts(resident).items()}
    part["values"].requires_grad_()
    x = torch.randn(8, IN, dtype=dtype)
    held = weakref.ref(x)
    with saved_tensors_hooks(lambda t: None, lambda _: None):
        y = resident(x, part, site, "bfloat16")
    del x
    gc.collect()
    assert held() is None
    assert y.requires_grad


def test_under_autocast_the_cast_input_is_kept(site: Any) -> None:
    x, part, saved = torch.randn(64, IN), parts(resident), []
    with (
        torch.autocast("cpu", torch.bfloat16),
        saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = resident(x, part, site, "int8")
    assert [t.dtype for t in saved if t.numel() == x.numel()] == [torch.int8]
    y.float().sum().backward()
    assert part["values"].grad is not None


def test_without_gradients_nothing_is_rounded_or_drawn(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "keep_int8", None)
    x, state = torch.randn(8, IN), torch.get_rng_state()
    for layer in (LAYERS | SLICES).values():
        with torch.no_grad():
            layer(x, parts(layer), site, "int8")
            torch.set_rng_state(state)
        frozen = {name: t.detach() for name, t in parts(layer).items()}
        torch.set_rng_state(state)
        layer(x.requires_grad_(), frozen, site, "int8")
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_it_compiles_to_one_graph(form: str, site: Any) -> None:
    torch._dynamo.reset()
    part, x = parts(resident), torch.randn(8, IN, requires_grad=True)
    layer = torch.compile(
        lambda x: resident(x, part, site, form), fullgraph=True, backend="aot_eager"
    )
    y = layer(x)
    y.square().sum().backward()
    found, part["values"].grad = part["values"].grad, None
    resident(x, part, site, "full").square().sum().backward()
    torch.testing.assert_close(found, part["values"].grad, rtol=0.2, atol=1.0)
    assert not torch.equal(found, part["values"].grad)
