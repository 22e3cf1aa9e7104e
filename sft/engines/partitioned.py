"""Parameters that DeepSpeed's ZeRO-3 has partitioned: whole inside `sft.adapters.gathered`.

Importing this module registers it. A base that is loaded under `zero.Init` is partitioned before
there is a trainer: an adapter that is put on it looks at its weights all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sft.adapters.gathered import Gathering, is_partitioned

_open: set[int] = set()  # DeepSpeed refuses to gather what is gathered


@contextmanager
def _gather(tensors: Sequence[Tensor]) -> Iterator[None]:
    held = {id(tensor): tensor for tensor in tensors if is_partitioned(tensor)}
    wanted = [tensor for key, tensor in held.items() if key not in _open]
    if not wanted:
        yield
        return
    import deepspeed

    keys = {id(tensor) for tensor in wanted}
    _open.update(keys)
    try:
        # all ranks write the same: the first one's copy is what is partitioned again
        with deepspeed.zero.GatheredParameters(wanted, modifier_rank=0), torch.no_grad():
            yield
    finally:
        _open.difference_update(keys)


GATHERING = Gathering(_gather)
