from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from sft.kernels.sparse_embedding import delta_embedding, embedding_reference, resident_embedding
from sft.kernels.write import write_

ROWS, COLS = 7, 5
IDS = {
    "matrix": torch.tensor([[0, 3, 3], [6, 1, 0]]),
    "one": torch.tensor([2]),
    "none": torch.empty(0, dtype=torch.int64),
    "int32": torch.tensor([5, 5, 1], dtype=torch.int32),
    "a view": torch.tensor([[0, 3], [6, 1], [2, 2]]).t(),
}


def table(k, make_pattern, dtype=torch.float64):
    torch.manual_seed(k)
    pattern = make_pattern(ROWS, COLS, k)
    values = torch.randn(k, dtype=torch.promote_types(dtype, torch.float32))
    return torch.randn(ROWS, COLS).to(dtype), values, pattern


def effective(weight, values, pattern):
    weight, flat = weight.clone(), weight.flatten()[pattern.indices.long()]
    write_(weight, pattern.indices, (flat + values).to(weight.dtype))
    return weight


@pytest.mark.parametrize("k", [0, 1, 12, ROWS * COLS])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("which", ["resident", "delta"])
def test_equals_the_oracle(make_pattern, make_site, which, ids, k) -> None:
    weight, values, pattern = table(k, make_pattern)
    values.requires_grad_()
    expected, site = embedding_reference(ids, weight, values, pattern), make_site(pattern)
    if which == "resident":
        got = resident_embedding(ids, effective(weight, values.detach(), pattern), values, site)
    else:
        got = F.embedding(ids, weight) + delta_embedding(ids, values, site)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(got)
    (dense,) = torch.autograd.grad(expected, values, seed)
    (mine,) = torch.autograd.grad(got, values, seed)
    torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [0, 1, 12])
@pytest.mark.parametrize("which", ["resident", "delta"])
def test_fact08_gradcheck(make_pattern, make_site, which, k) -> None:
    weight, values, pattern = table(k, make_pattern)
    ids, site = IDS["matrix"], make_site(pattern)

    def layer(values):
        if which == "delta":
            return delta_embedding(ids, values, site)
        return resident_embedding(ids, effective(weight, values.detach(), pattern), values, site)

    assert gradcheck(layer, [values.requires_grad_()])


@pytest.mark.parametrize("which", ["resident", "delta"])
def test_look_ups_of_the_padding_row_carry_no_gradient(make_pattern, make_site, which) -> None:
    weight, values, pattern = table(ROWS * COLS, make_pattern)
    values.requires_grad_()
    ids, site = IDS["matrix"], make_site(pattern)
    dense = weight.clone().requires_grad_()
    F.embedding(ids, dense, padding_idx=3).sum().backward()
    if which == "resident":
        got = resident_embedding(ids, weight, values, site, padding_idx=3)
    else:
        got = delta_embedding(ids, values, site, padding_idx=3)
    got.sum().backward()
    assert torch.equal(values.grad.view(ROWS, COLS), dense.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_are_wide(make_pattern, make_site, dtype) -> None:
    weight, values, pattern = table(12, make_pattern, dtype)
    ids = torch.zeros(1000, dtype=torch.int64)
    y = resident_embedding(ids, weight, values.requires_grad_(), make_site(pattern))
    assert y.dtype == dtype
    y.sum().backward()
    assert values.grad.tolist() == [1000.0 if j < COLS else 0.0 for j in pattern.indices.tolist()]


@pytest.mark.parametrize("which", ["resident", "delta"])
def test_the_tap_sees_the_whole_gradient(make_pattern, make_site, which) -> None:
    weight, values, pattern = table(12, make_pattern)
    values.requires_grad_()
    seen = []
    site = make_site(pattern, tap=lambda outer: seen.append(outer.block(0, ROWS)))
    ids = IDS["matrix"]
    if which == "resident":
        y = resident_embedding(ids, weight, values, site)
    else:
        y = delta_embedding(ids, values, site)
    seed = torch.randn_like(y)
    y.backward(seed)
    dense = weight.clone().requires_grad_()
    F.embedding(ids, dense).backward(seed)
    torch.testing.assert_close(seen, [dense.grad], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["resident", "delta"])
def test_backward_refuses_a_changed_table(make_pattern, make_site, which) -> None:
    weight, values, pattern = table(12, make_pattern)
    values.requires_grad_()
    site = make_site(pattern)
    if which == "resident":
        y = resident_embedding(IDS["one"], weight, values, site)
    else:
        y = delta_embedding(IDS["one"], values, site)
    site.stamp = 1
    with pytest.raises(RuntimeError, match="changed since this forward"):
        y.sum().backward()
