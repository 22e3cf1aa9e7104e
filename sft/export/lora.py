"""Write an adapter as a stock PEFT LoRA, with one rank for each module."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import pad

from sft.adapters.geometry import Kind, layer_kind
from sft.errors import UserError
from sft.export.low_rank import Approximation, Factors
from sft.export.merged import half_the_digits
from sft.whole import written_whole

ERROR_FILE = "lora_error.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    Args:
        ranks: of each module that is in the file.
        errors: |delta - B A| / |delta| of the modules whose delta was rounded to a low rank.
    """

    ranks: dict[str, int]
    errors: dict[str, float]

    def lines(self) -> list[str]:
        """Tell the error of each module that has one."""
        return [
            f"{name}: rank {self.ranks[name]}, error {error:.3g} of the delta's norm"
            for name, error in self.errors.items()
            if name in self.ranks
        ]


def export_lora(
    model: Any,
    folder: Path,
    *,
    adapter: str = "default",
    uniform_rank: bool = False,
    dtype: torch.dtype | None = None,
    approximation: Approximation | None = None,
    check: Callable[[Path], None] | None = None,
) -> LoraExport:
    """Save an adapter in the format of `peft.LoraConfig`; the folder appears whole or not at all.

    Deltas of low rank, as of SoRA and S2FT, are written exactly; others by their nearest product
    of low rank, if that is near enough. Modules of rank 0 are left out. Scales are multiplied into
    B, so that alpha equals the rank. Modules trained densely (`modules_to_save`) come along.

    Args:
        model: A PeftModel whose adapter adds to weights; left as it is. Weights may be shapes.
        folder: Where to write; replaced when it exists.
        adapter: Which adapter.
        uniform_rank: Pad all modules with zeros to the largest rank, for servers that know no
            rank_pattern.
        dtype: Of the written factors, default: float32.
        approximation: How near the product of low rank has to be; default: `Approximation()`.
        check: Called with the finished folder before it takes its name; may raise.

    Raises:
        UserError: A module's delta is too far from a low rank, or no module is left.
    """
    factors, errors = _factors(model, adapter, approximation or Approximation())
    most = max(found.rank for found in factors.values())
    if uniform_rank:
        factors = {name: _padded(found, most) for name, found in factors.items()}
    state = kept_state(model, adapter)
    for name, found in factors.items():
        for part, tensor in (("A", found.a), ("B", found.b)):
            cast = tensor if dtype is None else tensor.to(dtype)
            state[f"{PREFIX}{name}.lora_{part}.weight"] = cast.cpu().contiguous()
    ranks = {name: found.rank for name, found in factors.items()}
    with written_whole(folder) as temporary:
        _config(model, adapter, ranks).save_pretrained(str(temporary))
        save_state(state, temporary / "adapter_model.safetensors")
        if errors:
            text = json.dumps(errors, indent=1) + "\n"
            (temporary / ERROR_FILE).write_text(text, encoding="utf-8")
        if check is not None:
            check(temporary)
    return LoraExport(ranks, errors)


def read_errors(folder: Path) -> dict[str, float]:
    """Return the relative errors that are noted beside a LoRA, by module; {} where it is exact."""
    path = folder / ERROR_FILE
    found: dict[str, float] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def lora_bound(model: Any, logits: Sequence[torch.Tensor], dtype: torch.dtype | None) -> float:
    """Return how far a LoRA may move the logits: half the digits of the coarsest type involved."""
    return max(half_the_digits(kind, logits) for kind in (model.dtype, dtype) if kind is not None)


def check_errors(model: Any, loaded: Any, errors: dict[str, float], eps: float) -> None:
    """Raise unless the rounded deltas of a loaded LoRA are as far off as was said.

    Args:
        model: with the adapter that was written.
        loaded: with the LoRA.
        errors: by module.
        eps: of the type of the factors.

    Raises:
        UserError: one of them is farther away.
    """
    ours, theirs = adapted_layers(model, "default"), adapted_layers(loaded, "default")
    for name, error in errors.items():
        delta = logical_delta(name, ours[name], "default")
        written = logical_delta(name, theirs[name], "default") if name in theirs else 0 * delta
        found = float((written - delta).norm() / delta.norm().clamp(min=1e-30))
        if not found <= error + 4 * eps + 1e-4:
            raise UserError(
                f"export: the LoRA, loaded by stock PEFT, is {found:.3g} away from the delta of "
                f"{name}, not {error:.3g}"
            )


def _factors(
    model: Any, adapter: str, approximation: Approximation
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Return the factors of all modules whose rank is not 0, and the errors of rounded ones."""
    found, errors = {}, {}
    layers = adapted_layers(model, adapter)
    for name, layer in layers.items():
        exact = layer.low_rank(adapter) if hasattr(layer, "low_rank") else None
        if exact is None:
            factors, errors[name] = approximation.apply(name, logical_delta(name, layer, adapter))
        else:
            factors = Factors(*exact)
        if factors.rank:
            found[name] = factors
    if not found:
        raise UserError(
            f"--to lora: all {len(layers)} modules have rank 0, and a LoRA needs one with a "
            "rank; use --to merged, or train with a lower strength"
        )
    return found, errors


def logical_delta(name: str, layer: Any, adapter: str) -> torch.Tensor:
    """Return what an adapter adds to a layer's matrix: (out, in).

    Raises:
        UserError: it is no matrix of a linear layer, or nothing is added to it.
    """
    base = layer.get_base_layer()
    linear = layer_kind(base) in (Kind.LINEAR, Kind.CONV1D)
    scaled = adapter in getattr(layer, "lora_variant", {})
    if not linear or scaled or not hasattr(layer, "get_delta_weight"):
        what = "has no plain delta" if linear else "is not linear"
        raise UserError(f"--to lora: {name}, a {type(base).__name__}, {what}; use --to merged")
    delta: torch.Tensor = layer.get_delta_weight(adapter).detach()
    dense = delta.to_dense() if delta.is_sparse else delta
    return (dense.t() if layer_kind(base) is Kind.CONV1D else dense).float()


def adapted_layers(model: Any, adapter: str) -> dict[str, Any]:
    """Return the layers that carry an adapter, ours or stock PEFT's, by name in the base model."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(adapter in getattr(module, part) for part in module.adapter_layer_names)
    }


def _padded(factors: Factors, rank: int) -> Factors:
    missing = rank - factors.rank
    return Factors(pad(factors.a, (0, 0, 0, missing)), pad(factors.b, (0, missing)))


def kept_state(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """Return what the adapter's file holds beside the method's own tensors."""
    from peft import get_peft_model_state_dict

    own = f".{model.base_model.prefix}"
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter)
    kept = {name: tensor for name, tensor in state.items() if own not in name}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}


def _config(model: Any, adapter: str, ranks: dict[str, int]) -> Any:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    given, most = model.peft_config[adapter], max(ranks.values())
    # PEFT looks for `(.*\.)?(KEY)$`: without the anchor a key fits every deeper path of that end
    fewer = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    layers = adapted_layers(model, adapter)
    return LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=targets(model.get_base_model(), list(ranks)),
        rank_pattern=fewer,
        alpha_pattern=dict(fewer),
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(layers[n].get_base_layer(), Conv1D) for n in ranks),
        modules_to_save=None if given.modules_to_save is None else sorted(given.modules_to_save),
        task_type=given.task_type,
        base_model_name_or_path=given.base_model_name_or_path,
        revision=given.revision,
        inference_mode=True,
    )


def targets(model: Any, names: list[str]) -> list[str] | str:
    """Return the modules by full name; as one expression where a name is another one's end."""
    wanted = set(names)
    ends = tuple(f".{name}" for name in names)
    if not any(name.endswith(ends) and name not in wanted for name, _ in model.named_modules()):
        return sorted(names)
    return "|".join(re.escape(name) for name in sorted(names))


def save_state(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write the tensors of an adapter file."""
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})
