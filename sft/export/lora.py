"""Write an adapter whose deltas have a low rank as a stock PEFT LoRA, one rank for each module."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from sft.errors import UserError
from sft.export.merged import Batches, logits_of
from sft.whole import written_whole

PREFIX = "base_model.model."


class Factors(NamedTuple):
    """What stock LoRA adds at a scale of 1: y = base(x) + x A^T B^T."""

    a: torch.Tensor  # (r, in), float32
    b: torch.Tensor  # (out, r)

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return len(self.a)


def export_lora(
    model: Any,
    folder: Path,
    *,
    adapter: str = "default",
    uniform_rank: bool = False,
    dtype: torch.dtype | None = None,
    check: Callable[[Path], None] | None = None,
) -> dict[str, int]:
    """Save an adapter in the format of `peft.LoraConfig`; the folder appears whole or not at all.

    Each module has the rank its delta has; those of rank 0 are left out. Scales are multiplied into
    B, so that alpha equals the rank. Modules trained densely (`modules_to_save`) come along.

    Args:
        model: A PeftModel with a sparse adapter; left as it is.
        folder: Where to write; replaced when it exists.
        adapter: Which adapter.
        uniform_rank: Pad all modules with zeros to the largest rank, for servers that know no
            rank_pattern.
        dtype: Of the written factors, default: float32.
        check: Called with the finished folder before it takes its name; may raise.

    Returns:
        The rank of each module that is in the file.

    Raises:
        UserError: A module's delta is not of low rank, or no module is left.
    """
    factors, tuner = _factors(model, adapter), model.base_model
    most = max(found.rank for found in factors.values())
    if uniform_rank:
        factors = {name: _padded(found, most) for name, found in factors.items()}
    state = _kept_state(model, adapter)
    for name, found in factors.items():
        for part, tensor in (("A", found.a), ("B", found.b)):
            cast = tensor if dtype is None else tensor.to(dtype)
            state[f"{PREFIX}{name}.lora_{part}.weight"] = cast.cpu().contiguous()
    ranks = {name: found.rank for name, found in factors.items()}
    with written_whole(folder) as temporary:
        _config(tuner, adapter, ranks).save_pretrained(str(temporary))
        _save(state, temporary / "adapter_model.safetensors")
        if check is not None:
            check(temporary)
    return ranks


def lora_bound(model: Any, logits: Sequence[torch.Tensor], dtype: torch.dtype | None) -> float:
    """Return how far a LoRA may move the logits: half the digits of the coarsest type involved."""
    eps = max(torch.finfo(kind).eps for kind in (model.dtype, dtype) if kind is not None)
    return float(eps**0.5 * max(float(batch.abs().max()) for batch in logits))


def verify_lora(
    folder: Path, base: Any, batches: Batches, expected: Sequence[torch.Tensor], *, bound: float
) -> float:
    """Load a LoRA folder with stock PEFT over its base and compare logits.

    Args:
        folder: What `export_lora` wrote.
        base: The bare base model; it carries the LoRA afterwards.
        batches: Inputs of the comparison.
        expected: Logits of the trained model on them.
        bound: Largest difference allowed.

    Returns:
        The largest absolute difference found.

    Raises:
        UserError: When the difference exceeds the bound.
    """
    from peft import PeftModel

    found = logits_of(PeftModel.from_pretrained(base, str(folder)), batches)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    if not worst <= bound:  # NaN fails too
        raise UserError(
            "export: the LoRA, loaded by stock PEFT, is not the trained model: "
            f"max |logit difference| {worst:.3g}, allowed {bound:g}"
        )
    return worst


def _factors(model: Any, adapter: str) -> dict[str, Factors]:
    """Return the factors of all modules whose rank is not 0."""
    found = {}
    layers = model.base_model.adapted_layers(adapter)
    for name, layer in layers.items():
        exact = layer.low_rank(adapter)
        if exact is None:
            method = model.peft_config[adapter].peft_type.value.lower()
            raise UserError(
                f"--format lora: {name} carries a {method} delta that has no low rank; "
                "use --format merged"
            )
        if len(exact[0]):
            found[name] = Factors(*exact)
    if not found:
        raise UserError(
            f"--format lora: all {len(layers)} modules have rank 0, and a LoRA needs one with a "
            "rank; use --format merged, or train with a lower strength"
        )
    return found


def _padded(factors: Factors, rank: int) -> Factors:
    missing = rank - factors.rank
    return Factors(pad(factors.a, (0, 0, 0, missing)), pad(factors.b, (0, missing)))


def _kept_state(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """Return what the adapter's file holds beside the method's own tensors."""
    from peft import get_peft_model_state_dict

    own = f".{model.base_model.prefix}"
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter)
    kept = {name: tensor for name, tensor in state.items() if own not in name}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}


def _config(tuner: Any, adapter: str, ranks: dict[str, int]) -> Any:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    given, most = tuner.peft_config[adapter], max(ranks.values())
    # PEFT looks for `(.*\.)?(KEY)$`: without the anchor a key fits every deeper path of that end
    fewer = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    layers = tuner.adapted_layers(adapter)
    return LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=_targets(tuner.model, list(ranks)),
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


def _targets(model: Any, names: list[str]) -> list[str] | str:
    """Return the modules by full name; as one expression where a name is another one's end."""
    wanted = set(names)
    ends = tuple(f".{name}" for name in names)
    if not any(name.endswith(ends) and name not in wanted for name, _ in model.named_modules()):
        return sorted(names)
    return "|".join(re.escape(name) for name in sorted(names))


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})
