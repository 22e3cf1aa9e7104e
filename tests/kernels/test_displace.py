"""`displace` against its oracle, bit for bit, however the tensors are cut, laid out or grouped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft.kernels.displace import Drawn, displace, displace_reference, draw_ahead
from sft.kernels.mask import Magnitude, Mask, Random, mask_of
from sft.kernels.noise import KINDS, TILE

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PARAMETERS = [1, 2**32 - 1, 3, 4, 5]
DRAWS = {
    "one draw": [(5, 1e-2)],
    "three draws": [(5, 1e-2), (2**63 + 6, -0.3), (7, 2.0)],
    "no draw": [],
    "a draw of 0": [(5, 0.0)],
}
MASKS: dict[str, Mask | None] = {
    "all": None,
    "small": Magnitude(0.5),
    "random": Random(9, 0.3),
}


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """A matrix, a scalar, a vector, a transposed matrix, an empty one."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 130), (), (37,), (60, 70), (0, 4)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[3] = made[3].t()
    made[0][0, :4] = torch.tensor([0.0, -0.0, 0.5, -0.5])
    return made


def same(left: Tensor, right: Tensor) -> bool:
    """Equal in every bit: -0 is not 0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    bits = [t.contiguous().view(-1).view(integers) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["", "decay"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_it_is_the_oracle(
    kind: str, dtype: torch.dtype, draws: list[tuple[int, float]], decay: float, mask: Mask | None
) -> None:
    weights = tensors(dtype)
    options = {"kind": kind, "decays": [decay] * 5, "masks": [mask] * 5}
    expected = [
        displace_reference(w, p, draws, kind=kind, decay=decay, mask=mask)
        for w, p in zip(weights, PARAMETERS, strict=True)
    ]
    together = displace(weights, PARAMETERS, draws, **options)
    ahead = draw_ahead([5, 7], PARAMETERS[:3], [w.numel() for w in weights[:3]], kind)
    prepared = displace(weights, PARAMETERS, draws, **options, drawn=ahead)
    in_place = [w.clone() for w in weights]
    returned = displace(in_place, PARAMETERS, draws, **options, out=in_place)
    assert all(map(Tensor.is_set_to, returned, in_place))
    for found in (together, prepared, in_place):
        assert all(map(same, found, expected))


def test_where_the_mask_is_0_the_bits_are_kept() -> None:
    """M1, M5: the set is that of the weights read, whatever the sign and size of the move."""
    for dtype in DTYPES:
        weights = tensors(dtype)
        for mask in (Magnitude(0.5), Random(9, 0.3)):
            for c in (-1e-3, 1e-3, 0.7):
                options = {"masks": [mask] * 5, "decays": [0.01] * 5}
                moved = displace(weights, PARAMETERS, [(8, c)], **options)
                for w, m, p in zip(weights, moved, PARAMETERS, strict=True):
                    chosen = mask_of(w, p, mask)
                    assert same(w[~chosen], m[~chosen])
                    if c == 0.7:
                        assert (w != m)[chosen].all()


def test_magnitudes_at_the_threshold_are_chosen() -> None:
    """M2: also where the threshold, here 0.1, lies between two numbers of the dtype."""
    for dtype in DTYPES:
        steps = torch.finfo(dtype).eps * torch.arange(-2, 3).double()
        weight = (0.1 * (1 + steps)).to(dtype)
        weight = torch.cat([weight, -weight])
        for threshold in (0.1, *weight[:5].tolist()):
            chosen = weight.double().abs() <= threshold
            assert chosen.any()
            moved = displace([weight], [1], [(1, 1.0)], masks=[Magnitude(threshold)])[0]
            assert torch.equal(moved != weight, chosen)
            assert torch.equal(mask_of(weight, 1, Magnitude(threshold)), chosen)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("queries", [1, 11])
def test_any_group_any_cut_any_number_of_threads(threads: int, queries: int) -> None:
    """Z6: alone, among others, in blocks of any size, cut among threads: the same bits."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator) for n in (800_001, 9, TILE)]
    draws = [(key, 1e-3 * key) for key in range(1, queries + 1)]
    together = displace(weights, [1, 2, 3], draws)
    assert torch.get_num_threads() == threads
    ahead = draw_ahead(range(1, queries + 1), [3, 1], [TILE, 800_001], "rademacher")
    assert all(map(same, together, displace(weights, [1, 2, 3], draws, drawn=ahead)))
    for w, p, m in zip(weights, [1, 2, 3], together, strict=True):
        assert same(displace([w], [p], draws)[0], m)
        assert same(displace_reference(w, p, draws), m)


@pytest.mark.parametrize("shape", [(600, 900), (300_001, 2)], ids=["rows", "long rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_weights_are_taken_in_pieces(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    expected = displace_reference(weight, 4, DRAWS["three draws"], decay=0.1)
    options = {"decays": [0.1]}
    assert same(displace([weight], [4], DRAWS["three draws"], **options)[0], expected)
    dense = torch.empty(weight.shape, dtype=dtype)
    displace([weight], [4], DRAWS["three draws"], **options, out=[dense])
    assert same(dense, expected)


def test_a_part_of_a_parameter_says_where_it_starts() -> None:
    """Z6: shards."""
    weight = torch.randn(3 * TILE, generator=torch.Generator().manual_seed(0))
    whole = displace([weight], [6], [(1, 0.1)], masks=[Random(2, 0.5)])[0]
    starts = [0, 1, TILE, 2 * TILE + 77]
    parts = [weight[a:b] for a, b in zip(starts, [*starts[1:], len(weight)], strict=True)]
    for drawn in (None, draw_ahead([1], [6], [len(weight)], "rademacher")):
        options = {"masks": [Random(2, 0.5)] * 4, "starts": starts, "drawn": drawn}
        assert same(torch.cat(displace(parts, [6] * 4, [(1, 0.1)], **options)), whole)


def test_there_and_back_differs_but_candidate_and_update_agree() -> None:
    """A candidate's weights are those of the update to it: both are one rounding of one sum."""
    weights = tensors(torch.bfloat16)
    candidate = displace(weights, PARAMETERS, [(3, 0.01)])
    update = [w.clone() for w in weights]
    displace(update, PARAMETERS, [(3, 0.01)], out=update)
    assert all(map(same, candidate, update))
    there = displace(weights, PARAMETERS, [(3, -0.01)])
    back = displace(there, PARAMETERS, [(3, 0.01)])
    assert not all(map(same, back, weights))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_random_mask_has_its_share(share: float) -> None:
    """M8: a share of s leaves 1 - s untouched; a thresholded normal would leave Phi of it."""
    weight = torch.ones(1000, 2000)
    moved = displace([weight], [7], [(1, 0.5)], masks=[Random(11, share)])[0]
    assert (moved != weight).double().mean().item() == pytest.approx(share, abs=0.002)


def test_random_masks_of_two_parameters_and_two_keys_differ() -> None:
    weight = torch.ones(2**18)
    one = mask_of(weight, 1, Random(1, 0.5)).double() - 0.5
    for other in (mask_of(weight, 2, Random(1, 0.5)), mask_of(weight, 1, Random(2, 0.5))):
        assert abs((one * (other.double() - 0.5)).mean()) < 4 * 0.25 / 2**9


def test_a_mask_is_not_made_of_the_noise_it_masks() -> None:
    """The masks' stream is another one, even under the same key."""
    weight = torch.zeros(2**18)
    z = displace([weight], [1], [(1, 1.0)], kind="gaussian_table")[0]
    chosen = mask_of(weight, 1, Random(1, 0.5))
    assert abs(z[chosen].mean()) < 4 / 2**8.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_large_temporary_in_place(dtype: torch.dtype) -> None:
    """Views of the weights aside, nothing made on the way is above 2 MiB."""
    weight = torch.ones(2400, 1000, dtype=dtype)
    strided = [torch.ones(shape, dtype=dtype).t() for shape in ((1000, 2400), (2_400_001, 2))]
    weights = [weight, *strided]
    mine = {w.untyped_storage().data_ptr() for w in weights}
    made: list[int] = []

    class Gauge(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in mine:
                    made.append(leaf.untyped_storage().nbytes())
            return result

    with Gauge():
        options = {"decays": [0.1] * 3, "masks": [Magnitude(2.0)] * 3}
        displace(weights, [1, 2, 3], [(1, 0.1)], out=weights, **options)
    assert made
    assert max(made) <= 2**21 < weight.numel() * weight.element_size()


def test_the_global_random_state_is_left_alone() -> None:
    """Z8."""
    before = torch.get_rng_state()
    displace(tensors(torch.float32), PARAMETERS, [(1, 1.0)], kind="gaussian")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parameters": [1]}, "parameters: got 1, allowed is one for each of 2"),
        ({"decays": [0.1]}, "decays: got 1, allowed is one for each of 2"),
        ({"masks": [None]}, "masks: got 1, allowed is one for each of 2"),
        ({"out": [torch.ones(3)]}, "out: got 1, allowed is one for each of 2"),
        ({"out": [torch.ones(3), torch.ones(4)]}, "out: got .* allowed is shaped like its weight"),
        ({"weights": [torch.ones(3, dtype=torch.int8)] * 2}, "weights: got torch.int8, allowed"),
        ({"weights": [torch.ones(3).to(torch.float8_e5m2)] * 2}, "weights: got torch.float8_e5m2"),
        ({"kind": "uniform"}, "noise: got 'uniform', allowed is one of"),
        ({"drawn": Drawn("gaussian", {})}, "drawn: got words for 'gaussian', allowed is noise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    given = {"weights": [torch.ones(3)] * 2, "parameters": [1, 2], "draws": [(1, 1.0)]}
    with pytest.raises(ValueError, match=message):
        displace(**(given | changed))


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_a_threshold_is_a_magnitude(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold: got .*, allowed is a finite number >= 0"):
        Magnitude(threshold)


@pytest.mark.parametrize("share", [0.0, 1e-6, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"share: got .*, allowed is"):
        Random(1, share)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_on_a_gpu_have_the_same_bits() -> None:
    weight, options = tensors(torch.bfloat16)[0], {"masks": [Random(3, 0.5)]}
    found = displace([weight.cuda()], [1], DRAWS["three draws"], **options)[0]
    assert same(found.cpu(), displace([weight], [1], DRAWS["three draws"], **options)[0])
