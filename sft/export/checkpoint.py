"""The files of a stock model: what each tensor is, before it is read."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sft.tools.weights import Weights

# safetensors' names for types
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Slot(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def cast(self, dtype: torch.dtype | None) -> Slot:
        """Return what it is in another type, which integers do not take."""
        taken = self.dtype if dtype is None or not self.dtype.is_floating_point else dtype
        return Slot(taken, self.shape)


class Checkpoint(Weights):
    """The tensors of a saved model, by name, with their types and shapes."""

    def slot(self, name: str) -> Slot | None:
        """Return type and shape of a tensor; None for a type that is not of plain numbers."""
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as file:
            held = file.get_slice(name)
            dtype = _DTYPES.get(held.get_dtype())
            return None if dtype is None else Slot(dtype, tuple(held.get_shape()))
