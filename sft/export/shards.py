"""Write a trained model shard by shard: memory holds one shard, however large the model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sft.export.trained import TrainedWeights

SHARD = "5GB"
_PATTERN, INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"


def write_shards(
    weights: TrainedWeights,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD,
) -> int:
    """Write config.json and the weights of a model; a folder of them loads as a stock model.

    Args:
        weights: gives one tensor after another.
        folder: exists.
        dtype: that floating point weights are cast to; default: as they are.
        max_shard_size: of a file, such as "5GB"; a tensor that is larger has one to itself.

    Returns:
        The number of files.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    slots: dict[str, Any] = {name: weights.slot(name).cast(dtype) for name in weights.names()}
    split = split_state_dict_into_shards_factory(
        slots,
        get_storage_size=lambda slot: slot.bytes,
        get_storage_id=lambda slot: None,
        filename_pattern=_PATTERN,
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights.read(name).to(slots[name].dtype).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard  # or it would live on while the next one grows
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = weights.config
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    return len(split.filename_to_tensors)
