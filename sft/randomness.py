"""Random numbers that a block draws without anybody outside noticing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed torch, NumPy and Python for the block, and put all three back afterwards.

    Args:
        seed: 64 bits; the same seed gives the same dropout masks.
    """
    # not torch.manual_seed, which formats a stack trace where CUDA is not in use
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    if on_gpu:
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        if on_gpu:
            torch.cuda.set_rng_state_all(states[1])
        np.random.set_state(numpy_state)
        random.setstate(python_state)
