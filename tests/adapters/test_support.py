from __future__ import annotations

import pytest
import torch

from sft.adapters.support import as_indices, check_indices, fingerprint, support_hash


@pytest.mark.parametrize(
    "indices, message",
    [
        (torch.tensor([0.0, 1.0]), "got torch.float32 of 1 dimensions"),
        (torch.tensor([[0, 1]]), "got torch.int64 of 2 dimensions"),
        (torch.tensor([-1, 3]), r"position -1 is outside \[0, 12\)"),
        (torch.tensor([0, 12]), r"position 12 is outside \[0, 12\)"),
        (torch.tensor([3, 2]), "strictly ascending"),
        (torch.tensor([3, 3]), "strictly ascending"),
    ],
)
def test_fact04_bad_supports_are_refused(indices: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_indices(indices, (3, 4), "file: x")
    assert str(caught.value).startswith("file: x: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("positions", [[], [0], [11], [0, 5, 11], list(range(12))])
def test_fact04_good_supports_pass(positions: list[int], dtype: torch.dtype) -> None:
    indices = torch.tensor(positions, dtype=dtype)
    check_indices(indices, (3, 4), "file")
    assert indices.tolist() == positions


def test_indices_are_narrow_where_they_fit() -> None:
    cpu = torch.device("cpu")
    assert as_indices(torch.tensor([1]), (2, 3), cpu).dtype == torch.int32
    assert as_indices(torch.tensor([1]), (2**16, 2**15), cpu).dtype == torch.int64


def test_one_checkpoint_has_one_fingerprint_in_every_dtype() -> None:
    weight = torch.randn(300, 200) / 50
    stored = weight.bfloat16()
    for loaded in (stored, stored.float(), stored.double()):
        assert fingerprint(loaded) == fingerprint(stored)
    assert fingerprint(weight) == fingerprint(stored)


def test_a_fingerprint_reads_many_columns() -> None:
    """A step of numel / 256 is a multiple of such a width: it would read one column alone."""
    weight = torch.zeros(256, 1024)
    seen = {
        fingerprint(weight.index_fill(1, torch.arange(start, start + 64), 1.0))
        for start in range(0, 1024, 64)
    }
    assert len(seen) == 16


def test_fingerprints_differ() -> None:
    weight = torch.randn(30, 20)
    seen = {fingerprint(weight), fingerprint(weight.view(20, 30)), fingerprint(weight + 1)}
    other = weight.clone()
    other[0, 0] += 1
    assert len(seen | {fingerprint(other)}) == 4
    assert all(0 < print_ < 2**63 for print_ in seen)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 4, dtype=torch.int8), torch.empty(4, 4, device="meta"), torch.empty(0, 4)],
)
def test_what_cannot_be_read_matches_anything(weight: torch.Tensor) -> None:
    assert fingerprint(weight) == 0


def test_half_precision_never_refuses_its_own_checkpoint() -> None:
    # float16 rounds what bfloat16 keeps (small weights) and keeps what it rounds
    weight = torch.randn(300, 200) / 50
    prints = [fingerprint(w) for w in (weight, weight.half(), weight.bfloat16().half())]
    assert len({p for p in prints if p}) == 1


def test_fact36_the_hash_depends_on_the_support_alone() -> None:
    a, b = torch.tensor([1, 2]), torch.tensor([3])
    expected = support_hash([("a", a), ("b", b)])
    assert support_hash([("b", b.int()), ("a", a.int())]) == expected
    for other in (
        [("a", b), ("b", a)],
        [("a", a)],
        [("a", torch.tensor([1, 4])), ("b", b)],
        [("c", a), ("b", b)],
    ):
        assert support_hash(other) != expected
