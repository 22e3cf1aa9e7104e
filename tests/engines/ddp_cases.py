"""Runs that two processes and one make alike: a case builds its trainer, in either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

STEPS = 8
Build = Callable[..., Any]


def rows(lab: Any) -> Any:
    """Rows of which differently many tokens count: means of the ranks' means would not do."""
    return lab.dataset(48).map(
        lambda row, i: {"labels": [-100] * (i % 5) + row["labels"][i % 5 :]}, with_indices=True
    )


def experts() -> Any:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2,
        pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def packed(lab: Any) -> Any:
    """Return a base whose linear layers but the head are in 4 bits; rows are whole blocks."""
    import bitsandbytes
    from torch import nn

    base = lab.base(hidden_size=64, intermediate_size=64)
    found = {name: m for name, m in base.model.named_modules() if isinstance(m, nn.Linear)}
    for name, plain in found.items():
        layer = bitsandbytes.nn.Linear4bit(
            plain.in_features, plain.out_features, bias=False, quant_type="nf4"
        )
        layer.load_state_dict(plain.state_dict())
        base.model.set_submodule(name, layer.to("cpu"))  # where they are packed
    return base


def peft(config: str, base: Callable[[Any], Any] = lambda lab: lab.base(), **settings: Any) -> Any:
    """Return what builds a model with an adapter."""

    def model(lab: Any) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model

        import sft

        owner = LoraConfig if config == "lora" else getattr(sft, config)
        torch.manual_seed(0)  # LoRA's start is not seeded
        return get_peft_model(base(lab), owner(task_type="CAUSAL_LM", **settings))

    return model


GROW = {"density": 0.1, "reselect_every": 3, "window": 2, "replace_fraction": 0.5}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (lambda lab: lab.base(), {}),
    "lora": (peft("lora", r=4, target_modules="all-linear"), {}),
    "spiel": (peft("SpielConfig", **GROW), {"max_grad_norm": 0.1}),
    "spiel-accumulated": (
        peft("SpielConfig", **GROW, candidates_from="update"),
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    ),
    "spiel-momentum": (peft("SpielConfig", **GROW, growth="momentum"), {}),
    "spiel-calibrated": (
        peft("SpielConfig", density=0.1, growth="none", selection="gradient"),
        {"optim": "sgd", "learning_rate": 1e-2},
    ),
    "spiel-nf4": (peft("SpielConfig", packed, **GROW), {}),
    "s2ft": (peft("S2FTConfig", density=0.1), {}),
    "s2ft-activation": (peft("S2FTConfig", density=0.1, selection="activation"), {}),
    "s2ft-gradient": (
        peft("S2FTConfig", ratio=0.25, selection="gradient", layout="permuted"),
        {"gradient_accumulation_steps": 2},
    ),
    "s2ft-experts": (peft("S2FTConfig", lambda lab: experts(), density=0.1), {}),
    "sora": (
        peft("SoRAConfig", r=4, strength=[25.0, 250.0], first_stage_share=0.5),
        {"learning_rate": 2e-3},
    ),
    "sltrain": (peft("SLTrainConfig", density=0.05, r=4), {}),
    "sltrain-scale": (peft("SLTrainConfig", density=0.05, r=4, trainable_scale=True), {}),
    "sltrain-pretrain": (peft("SLTrainConfig", density=0.05, r=4, form="pretrain"), {}),
}


def build(name: str, lab: Any, out: str, *, processes: int, **settings: Any) -> Any:
    """Return the trainer of a case; 8 rows make a batch, however many processes share them."""
    model, own = MODELS[name]
    defaults = {"max_steps": STEPS, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    given = {**defaults, **own, **settings}
    given["per_device_train_batch_size"] //= processes
    return lab.trainer(out, model=model(lab), trainer={"train_dataset": rows(lab)}, **given)


def left_by(trainer: Any) -> dict[str, Any]:
    """Return what a run ends with: trained values, supports, losses."""
    model = trainer.model
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    found = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return {
        "trained": {n: t for n, t in found.items() if n in trained},
        "whole": {n: t for n, t in found.items() if t.is_floating_point() and n not in trained},
        "supports": {n: t for n, t in found.items() if not t.is_floating_point()},
        "replaced": dict(trainer.sparse_callback.replaced),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "processes": trainer.args.world_size,
    }
