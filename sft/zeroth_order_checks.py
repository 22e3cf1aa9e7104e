"""What a zeroth-order run refuses, each with the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sft.identity import sparse_tuner
from sft.optim.zeroth_order.config import ZerothOrderConfig
from sft.updates import wants_per_layer


def check_run(trainer: Any, config: ZerothOrderConfig) -> None:
    """Raise ValueError when the trainer's arguments have no meaning without gradients."""
    args = trainer.args
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise ValueError(
            "deepspeed: zeroth-order training holds no gradients and no optimizer state to shard, "
            "and perturbs whole weights; remove it, and start several processes with torchrun"
        )
    if getattr(trainer, "is_fsdp_enabled", False):
        raise ValueError(
            "fsdp: zeroth-order training perturbs whole weights, which FSDP shards; remove it, and "
            "start several processes with torchrun: they exchange 24 bytes an update"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: got {args.n_gpu} in one process, whose replicas would not see the "
            "perturbation; set CUDA_VISIBLE_DEVICES to one, or start a process each with torchrun"
        )
    if args.fp16 and trainer.accelerator.scaler is not None:
        raise ValueError(
            "fp16: its loss scaler waits for gradients that never come; load the model in float16 "
            "(model.dtype) without it, or use bf16"
        )
    if args.torch_compile and config.mode == "exact":
        raise ValueError(
            "torch_compile: a compiled model does not see weights that stand in for others; set "
            "mode='inplace' or torch_compile=False"
        )
    _check_policy_loss(args)


def check_trained(
    trainer: Any, config: ZerothOrderConfig, parameters: Sequence[tuple[str, nn.Parameter]]
) -> None:
    """Raise ValueError when what is trained cannot be trained without gradients."""
    model = trainer.model
    if not parameters:
        raise ValueError("model: no parameter requires a gradient, so there is nothing to train")
    if config.sparsity > 0 and getattr(model, "peft_config", None):
        raise ValueError(
            f"sparsity: got {config.sparsity} for an adapter, whose weights start at zero and "
            "would be frozen as soon as they move; set sparsity=0, the adapter is sparse itself"
        )
    tuner = sparse_tuner(model)
    if tuner is None:
        return
    for name in tuner.active_adapters:
        dynamics = tuner.dynamics(name, 1)
        if dynamics is not None and (dynamics.reads_gradients or dynamics.reads_accumulators):
            raise ValueError(
                f"growth: adapter {name!r} moves its support by gradients, of which there are "
                "none; set growth='none' and choose the support at the start"
            )
        chosen = tuner.peft_config[name].optimizer
        if chosen not in ("auto", "trainer"):
            raise ValueError(
                f"optimizer: adapter {name!r} asks for {chosen!r}, which needs gradients; leave it "
                "at 'auto', zeroth_order.update names the rule"
            )
    if wants_per_layer(tuner):
        raise ValueError(
            "per_layer_updates: happen during backward, of which there is none; switch them off"
        )


def _check_policy_loss(args: Any) -> None:
    """Refuse a policy gradient loss whose value is constant: only its gradient is not."""
    reused = getattr(args, "num_iterations", None)
    batches = getattr(args, "steps_per_generation", None)
    if reused is None or batches is None or getattr(args, "use_vllm", False):
        return
    if args.gradient_accumulation_steps % (reused * batches) == 0:
        raise ValueError(
            "num_iterations: on fresh samples the loss of GRPO has the same value whatever the "
            "weights, so its differences are 0; set num_iterations=2 or more"
        )
