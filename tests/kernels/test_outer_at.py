from __future__ import annotations

import pytest
import torch

from sft.kernels import outer_at as module
from sft.kernels.outer_at import outer_at, outer_at_reference, uses_sampled

SHAPES = [  # tokens, rows, cols, k
    (1, 1, 1, 1),
    (1, 1, 1, 0),
    (0, 5, 7, 3),
    (3, 1, 9, 4),
    (5, 9, 1, 4),
    (13, 33, 17, 40),
    (13, 33, 17, 33 * 17),
    (64, 48, 63, 200),
]


@pytest.fixture(params=["sampled", "row blocks"])
def path(request, monkeypatch):
    """Force one path by the density threshold, blocks of few rows, and record the calls."""
    monkeypatch.setattr(module, "SAMPLED_UP_TO", {"cpu": 1.0 if request.param == "sampled" else -1})
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    calls = []
    for name in ("SAMPLED_OUTER", "TILED_OUTER"):
        real = getattr(module, name)

        def spy(*args, name=name, real=real):
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(module, name, spy)
    yield request.param
    assert set(calls) == {"SAMPLED_OUTER" if request.param == "sampled" else "TILED_OUTER"}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens, rows, cols, k", SHAPES)
def test_fact06_equals_the_oracle(path, make_pattern, tokens, rows, cols, k, index_dtype) -> None:
    torch.manual_seed(tokens)
    left, right = torch.randn(tokens, rows), torch.randn(tokens, cols)
    pattern = make_pattern(rows, cols, k, index_dtype)
    got = outer_at(left, right, pattern)
    assert (got.dtype, got.shape) == (torch.float32, (k,))
    torch.testing.assert_close(
        got, outer_at_reference(left, right, pattern), rtol=1e-5, atol=1e-5, msg=path
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fact06_other_dtypes_accumulate_widely(path, make_pattern, dtype) -> None:
    torch.manual_seed(1)
    left, right = torch.randn(700, 12).to(dtype), torch.randn(700, 9).to(dtype)
    pattern = make_pattern(12, 9, 20)
    got, expected = outer_at(left, right, pattern), outer_at_reference(left, right, pattern)
    assert got.dtype == expected.dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=10 * tolerance)


def test_fact06_non_contiguous_operands(path, make_pattern) -> None:
    torch.manual_seed(2)
    left, right = torch.randn(24, 13).t()[:, ::2], torch.randn(13, 14)[:, ::2]
    assert not left.is_contiguous() and not right.is_contiguous()
    pattern = make_pattern(12, 7, 30)
    expected = outer_at_reference(left, right, pattern)
    torch.testing.assert_close(outer_at(left, right, pattern), expected, rtol=1e-5, atol=1e-5)


def test_the_path_is_a_rule_of_density_and_device(make_pattern) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert uses_sampled(make_pattern(100, 100, 1000), cpu)
    assert not uses_sampled(make_pattern(100, 100, 1001), cpu)
    flips = [k for k in range(1, 400) if not uses_sampled(make_pattern(400, 400, k), gpu)]
    assert flips == list(range(flips[0], 400))
    assert 1 < flips[0] <= 0.003 * 400 * 400


def test_the_rule_for_gpus_is_that_of_the_model_and_the_compiled_code() -> None:
    """Recomputed from the instructions of the loop and an H100's peaks."""
    pytest.importorskip("triton")
    from device_cases.sampled import BUILDS
    from without_gpu.audit import audit
    from without_gpu.compiler import compiled_for
    from without_gpu.model import least_seconds

    from sft.kernels.triton.sampled import ENTRIES, TOKENS

    with compiled_for("sm_90") as kernels:
        BUILDS["bfloat16"].launch()
    code = audit(kernels[0])
    many = 1e12  # so many that a launch is nothing
    instructions = code.hot.total() * code.warps / (ENTRIES * TOKENS)
    # one entry of each operand at the least
    _, slowest = least_seconds(instructions=many * instructions, cache=many * 2)
    read, _ = least_seconds(cache=many * 2)
    turn, _ = least_seconds(memory=many * 4)
    tile, _ = least_seconds(operations=many * 2)
    assert slowest == "cache"
    assert pytest.approx(read / many, rel=0.02) == module.READ_SECONDS
    assert pytest.approx(turn / many, rel=0.02) == module.TURN_SECONDS
    assert pytest.approx(tile / many, rel=0.02) == module.TILE_SECONDS
    assert module.POSITIONS == ENTRIES


@pytest.mark.parametrize("k", [10, 200, 800])
def test_the_rule_counts_what_the_kernel_reads(make_pattern, k) -> None:
    """Sectors of an access in bfloat16, where rows hold many positions and where they hold few."""
    pytest.importorskip("triton")
    from without_gpu.interpreter import interpreted
    from without_gpu.traffic import measured

    from sft.kernels.triton.sampled import sampled_outer

    tokens, rows, cols = 128, 50, 40
    pattern = make_pattern(rows, cols, k)
    left, right = torch.ones(tokens, rows).bfloat16(), torch.ones(tokens, cols).bfloat16()
    with interpreted(), measured() as traffic:
        sampled_outer(left, right, pattern.indices, pattern.row_pointers, pattern.columns)
    reads = k + min(k, k / module.POSITIONS + rows)
    assert traffic.sectors("load") - 4 * k == pytest.approx(2 * tokens * reads, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_takes_the_same_paths(path, make_pattern, dtype) -> None:
    pytest.importorskip("triton")
    from without_gpu.interpreter import interpreted

    torch.manual_seed(3)
    left, right = torch.randn(70, 66).to(dtype), torch.randn(70, 33).to(dtype)
    pattern = make_pattern(66, 33, 100)
    with interpreted():
        found = outer_at(left, right, pattern)
    expected = outer_at_reference(left, right, pattern)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_fact37_row_blocks_hold_one_block(monkeypatch, make_pattern, largest_tensor) -> None:
    rows, cols, k = 512, 96, 600
    monkeypatch.setattr(module, "SAMPLED_UP_TO", {"cpu": -1})
    monkeypatch.setattr(module, "BLOCK_BYTES", 16 * cols * 4)
    left, right, pattern = torch.randn(8, rows), torch.randn(8, cols), make_pattern(rows, cols, k)
    assert left.numel() * 4 < rows * cols * 4 // 8
    operands = left.numel() * 4
    peak = largest_tensor(lambda: outer_at(left, right, pattern))
    assert peak <= max(operands, 16 * cols * 4, 8 * k)
    assert peak < rows * cols * 4 // 8


def test_fact37_sampling_holds_what_the_pattern_holds(make_pattern, largest_tensor) -> None:
    left, right, pattern = torch.randn(8, 512), torch.randn(8, 96), make_pattern(512, 96, 600)
    peak = largest_tensor(lambda: outer_at(left, right, pattern))
    assert peak <= max(left.numel() * 4, 8 * 600, 8 * 513)


def test_the_reference_itself_by_hand(make_pattern) -> None:
    left, right = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0], [7.0]])
    assert outer_at_reference(left, right, make_pattern(2, 1, 2)).tolist() == [26.0, 38.0]
