"""Write a sparse delta as an adapter of stock PEFT's SHiRA.

SHiRA (arXiv 2406.13175) adds a sparse matrix; stock PEFT gives every module r (in + out) values
for one r. What a module has fewer of is filled with zeros at positions that are not trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.errors import UserError
from sft.export.lora import PREFIX, adapted_layers, kept_state, save_state, targets
from sft.tools.change import Change, change_of
from sft.whole import written_whole


def export_shira(
    model: Any,
    folder: Path,
    *,
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    check: Callable[[Path], None] | None = None,
) -> dict[str, int]:
    """Save a sparse delta in the format of `peft.ShiraConfig`; the folder appears whole or not.

    Args:
        model: a PeftModel; weights may be shapes.
        folder: where to write; replaced when it exists.
        adapter: which adapter.
        dtype: of the values, default: float32.
        check: called with the finished folder before it takes its name; may raise.

    Returns:
        The number of trained weights of each module that is in the file.

    Raises:
        UserError: a delta is dense, or lies where SHiRA has none.
    """
    changes = {
        name: _change(name, x, adapter) for name, x in adapted_layers(model, adapter).items()
    }
    changes = {name: change for name, change in changes.items() if len(change.values)}
    if not changes:
        raise UserError("--to shira: the adapter trains no weights; use --to merged")
    r = max(-(-len(c.values) // sum(c.shape)) for c in changes.values())
    state = kept_state(model, adapter)
    for name, change in changes.items():
        rows, values = filled(name, change, r * sum(change.shape))
        state[f"{PREFIX}{name}.shira_indices"] = rows
        state[f"{PREFIX}{name}.shira_weight"] = values if dtype is None else values.to(dtype)
    with written_whole(folder) as temporary:
        _config(model, adapter, r, list(changes)).save_pretrained(str(temporary))
        save_state(state, temporary / "adapter_model.safetensors")
        if check is not None:
            check(temporary)
    return {name: len(change.values) for name, change in changes.items()}


def filled(name: str, change: Change, count: int) -> tuple[Tensor, Tensor]:
    """Return positions (2, count) int32, by row and column, and their values (count,) float32.

    Args:
        name: of the module, for the message.
        change: with positions.
        count: how many; those that are missing are the first free ones, with zeros.

    Raises:
        UserError: the weight is smaller.
    """
    if count > change.numel:
        raise UserError(
            f"--to shira: {name} of shape {change.shape} has fewer than the {count} values that "
            "stock PEFT gives each module here; use --to merged, or --to patch"
        )
    assert change.indices is not None
    missing = count - len(change.indices)
    free = torch.ones(change.numel, dtype=torch.bool)
    free[change.indices] = False
    more = free.nonzero().flatten()[:missing]
    positions, order = torch.cat([change.indices, more]).sort()
    values = torch.cat([change.values.float(), torch.zeros(missing)])[order]
    columns = change.shape[1]
    return torch.stack([positions // columns, positions % columns]).to(torch.int32), values


def _change(name: str, layer: Any, adapter: str) -> Change:
    base = layer.get_base_layer()
    if not isinstance(base, torch.nn.Linear):
        raise UserError(
            f"--to shira: {name} is a {type(base).__name__}, allowed is nn.Linear; use --to merged"
        )
    change = change_of(layer, adapter)
    if change.indices is None:
        raise UserError(
            f"--to shira: {name} carries a dense delta, allowed are sparse ones; use --to lora or "
            "--to merged"
        )
    return change


def _config(model: Any, adapter: str, r: int, names: list[str]) -> Any:
    from peft import ShiraConfig

    given = model.peft_config[adapter]
    return ShiraConfig(
        r=r,
        random_seed=0,  # positions drawn before the file's take their place
        target_modules=targets(model.get_base_model(), names),
        modules_to_save=None if given.modules_to_save is None else sorted(given.modules_to_save),
        task_type=given.task_type,
        auto_mapping=given.auto_mapping,
        base_model_name_or_path=given.base_model_name_or_path,
        revision=given.revision,
        inference_mode=True,
    )
