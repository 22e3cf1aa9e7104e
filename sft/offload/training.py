"""A Trainer whose frozen weights or optimizer state lie off its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sft.offload.base import OffloadedBase
from sft.offload.config import OffloadConfig
from sft.optim.adamw import SparseAdamW
from sft.optim.offloaded import OffloadedOptimizer
from sft.optim.per_layer import PerLayerOptimizer
from sft.optim.sm3 import SM3

FOLDER = "offload"


class OffloadMixin:
    """Offloads what `OffloadConfig` names.

    The base is away from before the Trainer moves the model to its device until
    `offloaded_base.close()`: measurements before and after training run on it as well. The
    optimizer's state is away for as long as there is one.
    """

    offload: OffloadConfig | None = None
    offloaded_base: OffloadedBase | None = None

    def _begin_offload(
        self: Any, config: OffloadConfig | None, model: Any, args: Any, peft_config: Any
    ) -> None:
        """Send the base away; called before the Trainer looks at the model.

        Raises:
            ValueError: what is asked for can't be done.
        """
        self.offload = config
        if config is None:
            return
        check_offload(config, model, args, peft_config)
        if config.base is not None:
            folder = Path(config.folder or Path(args.output_dir) / FOLDER)
            place = folder if config.base == "disk" else None
            self.offloaded_base = OffloadedBase(model, torch.device(args.device), place)

    def _offload_optimizer(self: Any, optimizer: Any) -> Any:
        """Return the optimizer whose state is away, if that is asked for.

        Raises:
            ValueError: it is one that can't be.
        """
        if self.offload is None or self.offload.optimizer is None:
            return optimizer
        if isinstance(optimizer, OffloadedOptimizer):
            return optimizer
        check_optimizer(optimizer, zeroth_order=self.zeroth_order is not None)
        if isinstance(optimizer, SparseAdamW):
            optimizer.homes = None  # the weights are where the parameters are
        self.optimizer = OffloadedOptimizer(optimizer)
        return self.optimizer


def check_offload(config: OffloadConfig, model: Any, args: Any, peft_config: Any) -> None:
    """Raise ValueError on what can't be offloaded, with what can be done."""
    if args is None or not isinstance(model, nn.Module) or peft_config is not None:
        raise ValueError(
            "offload: got no model with its adapter or no args, which say where weights go; call "
            "get_peft_model first, and pass model and args"
        )
    for key in ("deepspeed", "fsdp"):
        if getattr(args, key, None):
            raise ValueError(
                f"offload: got {key} as well, which keeps all of the state; leave offload out and "
                f"let {key} offload"
            )
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"offload: got {max(args.world_size, args.n_gpu)} devices, allowed is 1; use "
            "DeepSpeed's offload_param and offload_optimizer"
        )
    if args.torch_compile:
        raise ValueError("offload: got torch_compile=True, which moves no weights; set it to False")
    if config.base is None:
        return
    if getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(
            "offload.base: got a quantised base, whose bytes stay on the device; leave out "
            "offload.base or model.quantization"
        )
    wanted = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    dtype = getattr(model, "dtype", None)
    if wanted is not None and dtype != wanted:
        raise ValueError(
            f"offload.base: got {dtype} weights under {'bf16' if args.bf16 else 'fp16'}, whose "
            f"casts backward would keep; load the model with dtype {wanted}, or turn it off"
        )


def check_optimizer(optimizer: Optimizer, *, zeroth_order: bool) -> None:
    """Raise ValueError on an optimizer whose state can't lie on the CPU."""
    reason = None
    if zeroth_order:
        reason = "zeroth order, which keeps no state"
    elif isinstance(optimizer, SM3):
        reason = "SM3, whose state is a row and a column a matrix"
    elif isinstance(optimizer, PerLayerOptimizer):
        reason = "per_layer_updates, which step in backward"
    elif type(optimizer).__module__.startswith("bitsandbytes"):
        reason = f"bitsandbytes' {type(optimizer).__name__}, which steps on the device"
    if reason is not None:
        raise ValueError(f"offload.optimizer: got {reason}; leave offload.optimizer out")
