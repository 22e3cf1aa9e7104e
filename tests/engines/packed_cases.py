"""Methods over a base that bitsandbytes has packed in 4 or 8 bits, as runs of several processes."""

from __future__ import annotations

from typing import Any

SLICES = {"density": 0.1}
BY_BATCHES = ({"growth": "none", "selection": "gradient"}, {"optim": "sgd", "learning_rate": 1e-2})
FORMS = {
    "packed": ("nf4", "uint8"),
    "sharded": ("nf4", "float32"),  # 4 bits in numbers that FSDP shards
    "int8": ("int8", ""),
}


def methods(grow: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return configuration and training settings by name.

    Args:
        grow: settings of SpIEL whose support moves.
    """
    still, by_sgd = BY_BATCHES
    return {
        "spiel": ("SpielConfig", grow, {}),
        "spiel-momentum": ("SpielConfig", {**grow, "growth": "momentum"}, {}),
        "spiel-calibrated": ("SpielConfig", {"density": 0.1, **still}, by_sgd),
        "spiel-embedding": (
            "SpielConfig", {**grow, "target_modules": ["embed_tokens", "q_proj"]}, {},
        ),
        "s2ft": ("S2FTConfig", SLICES, {}),
        "s2ft-activation": ("S2FTConfig", {**SLICES, "selection": "activation"}, {}),
        "s2ft-gradient": ("S2FTConfig", {**SLICES, "selection": "gradient"}, {}),
        "sora": ("SoRAConfig", {"r": 4}, {}),
        "sltrain": ("SLTrainConfig", {"density": 0.05, "r": 4}, {}),
    }  # fmt: skip


def write_dense(lab: Any) -> None:
    """Write the model that `base` packs; its rows are whole blocks of bitsandbytes'."""
    lab.base(hidden_size=64, intermediate_size=128).save_pretrained(lab.folder / "dense")


def base(form: str) -> Any:
    """Return what loads the model of `write_dense`, packed."""

    def load(lab: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        kind, storage = FORMS[form]
        packing = (
            BitsAndBytesConfig(load_in_8bit=True)
            if kind == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=kind,
                bnb_4bit_compute_dtype=torch.float32,
                bnb_4bit_quant_storage=getattr(torch, storage),
            )
        )
        return AutoModelForCausalLM.from_pretrained(
            lab.folder / "dense", quantization_config=packing, device_map="cpu"
        )

    return load


def by_forward_passes(cases: Any, lab: Any, out: str, *, processes: int) -> Any:
    """Return a trainer of an adapter that takes no gradients."""
    from functools import partial

    from sft import SparseTrainer, ZerothOrderConfig

    zeroth = ZerothOrderConfig(eps=5e-2, queries=2)
    return lab.trainer(
        out,
        model=cases.peft("SpielConfig", base("packed"), density=0.05, growth="none")(lab),
        cls=partial(SparseTrainer, zeroth_order=zeroth),
        trainer={"train_dataset": cases.rows(lab)},
        per_device_train_batch_size=8 // processes,
        max_steps=6,
        learning_rate=2e-2,
    )


def add_to(cases: Any) -> None:
    """Let `build` of `ddp_cases` know every method over every form, as "packed-spiel"."""
    for name, (owner, fields, training) in methods(cases.GROW).items():
        for form in FORMS:
            model = cases.peft(owner, base(form), **fields)
            cases.MODELS[f"{form}-{name}"] = (model, training)
