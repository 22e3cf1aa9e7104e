"""What a zeroth-order run refuses, each with the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sft.identity import sparse_tuner
from sft.optim.zeroth_order.config import ZerothOrderConfig


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
            "torch_compile: got True, whose graphs the hooks of exact mode would cut or miss; set "
            "mode='inplace' or torch_compile=False"
        )
    _check_policy_loss(args)
    _check_unread(args, config)


def check_trained(
    trainer: Any, config: ZerothOrderConfig, parameters: Sequence[tuple[str, nn.Parameter]]
) -> None:
    """Raise ValueError when what is trained cannot be trained without gradients."""
    model = trainer.model
    if not parameters:
        raise ValueError("model: no parameter requires a gradient, so there is nothing to train")
    places = sorted({str(parameter.device) for _, parameter in parameters})
    if places == ["meta"] or len(places) > 1:
        raise ValueError(
            f"device_map: puts what is trained on {', '.join(places)}; load the model without a "
            "map, one device has to hold all that is trained"
        )
    compiled = any(_is_compiled(module) for module in model.modules())
    if compiled and config.mode == "exact":
        raise ValueError(
            "model: is compiled, in graphs that the hooks of exact mode would cut or miss; set "
            "mode='inplace' or leave torch.compile out"
        )
    if config.sparsity > 0 and getattr(model, "peft_config", None):
        raise ValueError(
            f"sparsity: got {config.sparsity} for an adapter, whose weights start at zero and "
            "would be frozen as soon as they move; set sparsity=0, the adapter is sparse itself"
        )
    tuner = sparse_tuner(model)
    if tuner is None:
        return
    for name in tuner.active_adapters:
        for key, allowed in backward_only(tuner.peft_config[name]).items():
            value = getattr(tuner.peft_config[name], key)
            raise ValueError(
                f"{key}: got {value!r} in adapter {name!r}, which needs gradients; set {allowed}"
            )


def backward_only(config: Any) -> dict[str, str]:
    """Return the settings of a method that need a backward pass, each with what to set instead."""
    found = dict(getattr(config, "backward_only", {}))
    if getattr(config, "optimizer", "auto") not in ("auto", "trainer"):
        found["optimizer"] = "auto"
    if getattr(config, "saved_inputs", "full") != "full":
        found["saved_inputs"] = "full"
    return found


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _check_unread(args: Any, config: ZerothOrderConfig) -> None:
    """Refuse training arguments that would be ignored."""
    for key in ("optim", "optim_args"):
        got, default = getattr(args, key), type(args).__dataclass_fields__[key].default
        if got != default:
            raise ValueError(
                f"{key}: got {getattr(got, 'value', got)!r}, of an optimizer of gradients; leave "
                "it out, zeroth_order.update names the rule"
            )
    if args.neftune_noise_alpha is not None and not config.dropout:
        raise ValueError(
            f"neftune_noise_alpha: got {args.neftune_noise_alpha}, noise of training like dropout, "
            "which is off; set dropout=True, or leave it out"
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
