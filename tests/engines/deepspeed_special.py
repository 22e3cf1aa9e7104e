"""Cases under DeepSpeed that are more than one training run: resume, half precision, refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

CUT = 5  # inside a window of SpIEL's


def runs() -> Any:
    """Return the script that loads this file."""
    return sys.modules.get("deepspeed_run") or sys.modules["__main__"]


def trained(lab: Any, name: str, stage: int, out: str, resume: Any = None, **settings: Any) -> Any:
    """Train a case and leave its adapter in the folder `out`."""
    trainer = runs().build(lab, name, stage, out, **settings)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(lab.folder / out / "saved"))
    return trainer


SAVING = {"save_strategy": "steps", "save_steps": CUT}


def interrupted(lab: Any) -> dict[str, Any]:
    """Train on to the end from a checkpoint, on several stages of ZeRO."""
    found = {}
    for name in ("spiel", "sora"):
        whole = trained(lab, name, 2, f"{name}-whole", **SAVING)
        checkpoint = lab.checkpoint(f"{name}-whole", CUT)
        found[name] = {"files": sorted(p.name for p in Path(checkpoint).iterdir())}
        found[name]["losses"] = runs().told(whole)["losses"][CUT:]
        for stage in (2, 3):
            on = trained(lab, name, stage, f"{name}-resumed-{stage}", checkpoint)
            found[name][f"losses-{stage}"] = runs().told(on)["losses"][CUT:]
    trained(lab, "spiel", 0, "spiel-resumed-0", lab.checkpoint("spiel-whole", CUT))
    return found


def from_plain(lab: Any) -> dict[str, Any]:
    """Go on from a checkpoint that one process without DeepSpeed has left."""
    trained(lab, "spiel", 2, "from-plain", lab.checkpoint("plain", CUT))
    return {}


def one_process(lab: Any) -> dict[str, Any]:
    """Go on in one process from a checkpoint of two."""
    trainer = trained(lab, "spiel", 2, "one-process", lab.checkpoint("spiel-whole", CUT))
    return runs().told(trainer)


def best(lab: Any) -> dict[str, Any]:
    """Load the first of two checkpoints at the end."""
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    settings = {**chosen, **every, "greater_is_better": True, "bf16": True}
    given = {"train_dataset": runs().cases.rows(lab), "eval_dataset": lab.dataset(8)}
    type(lab).conf = runs().config(2)
    trainer = lab.trainer("best", trainer=given, max_steps=8, **settings)
    trainer.train()
    trainer.save_model(str(lab.folder / "best" / "saved"))
    return {"best": Path(trainer.state.best_model_checkpoint).name}


def best_table(lab: Any) -> dict[str, Any]:
    """Load the first of two checkpoints, which hold a table that lies in parts."""
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    given = {"train_dataset": runs().cases.rows(lab), "eval_dataset": lab.dataset(8)}
    method = {"density": 0.1, "growth": "none", "target_modules": ["embed_tokens", "q_proj"]}
    model = runs().cases.peft("SpielConfig", **method)(lab)
    type(lab).conf = runs().config(3)
    settings = {**chosen, **every, "greater_is_better": True, "max_steps": 4}
    trainer = lab.trainer("best-table", model=model, trainer=given, **settings)
    trainer.train()
    trainer.save_model(str(lab.folder / "best-table" / "saved"))
    return {"best": Path(trainer.state.best_model_checkpoint).name}


def half(lab: Any) -> dict[str, Any]:
    """Train in bfloat16, with masters in float32."""
    import torch

    found = {}
    for stage in (2, 3):
        trainer = trained(lab, "spiel", stage, f"half-{stage}", bf16=True)
        found[str(stage)] = runs().told(trainer)
        if stage == 2:
            before = {n: p.bfloat16() for n, p in lab.weights(lab.base()).items()}
            after = lab.weights(trainer.model)
            found["frozen"] = all(torch.equal(before[name], after[name]) for name in before)
    return found


def offloaded(lab: Any) -> dict[str, Any]:
    """Keep masters, state and parameters on the CPU, as on a GPU's host."""
    host = {"offload_optimizer": {"device": "cpu"}}
    found = {}
    for stage, zero in ((2, host), (3, {**host, "offload_param": {"device": "cpu"}})):
        trainer = trained(lab, "spiel", stage, f"offloaded-{stage}", conf={"zero": zero})
        found[str(stage)] = type(trainer.optimizer.optimizer.optimizer).__name__
    return found


STOCK = ("SpielConfig", {"density": 0.1, "reselect_every": 3, "window": 2, "optimizer": "trainer"})


def native(lab: Any) -> dict[str, Any]:
    """Let DeepSpeed's Adam step what is offloaded; it is compiled when it first does."""
    method, settings = STOCK
    runs().cases.MODELS["native"] = (runs().cases.peft(method, **settings), {})
    conf = {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": True}
    trainer = trained(lab, "native", 2, "native", conf=conf)
    return {"steps": type(trainer.optimizer.optimizer.optimizer).__name__}


def partitioned_base(lab: Any) -> dict[str, Any]:
    """Put adapters on a base that was partitioned while it was loaded."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    import sft

    folder = lab.folder / "base"
    if torch.distributed.get_rank() == 0:
        lab.base().save_pretrained(folder)
    torch.distributed.barrier()
    configs = {
        "magnitude": sft.SpielConfig(density=0.1, growth="none", selection="magnitude"),
        "weight": sft.S2FTConfig(density=0.1, selection="weight"),
        "sora": sft.SoRAConfig(r=4),
    }
    found = {}
    type(lab).conf = runs().config(3)
    for name, config in configs.items():
        args = lab.arguments(f"partitioned-{name}", max_steps=2)
        base = LlamaForCausalLM.from_pretrained(folder)
        sizes = {parameter.numel() for parameter in base.parameters()}
        model = get_peft_model(base, config)
        trainer = sft.SparseTrainer(model=model, args=args, train_dataset=lab.dataset())
        trainer.train()
        trainer.save_model(str(lab.folder / f"partitioned-{name}" / "saved"))
        found[name] = {"sizes": sorted(sizes), **runs().told(trainer)}
    return found


REFUSED: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "sm3": ("SpielConfig", {"density": 0.1, "growth": "momentum"}, 2, {}),
    "sm3-static": ("SpielConfig", {"density": 0.1, "growth": "none", "optimizer": "sm3"}, 1, {}),
    "per-layer": ("SLTrainConfig", {"per_layer_updates": True}, 0, {}),
    "compaction": ("SoRAConfig", {"compact_after": 2}, 2, {}),
    "pretrain": ("SLTrainConfig", {"form": "pretrain"}, 3, {}),
    "experts": ("S2FTConfig", {"density": 0.1, "base": lambda _: runs().cases.experts()}, 3, {}),
    "storage": (
        "S2FTConfig",
        {"density": 0.1, "base": lambda lab: runs().packed_cases.base("sharded")(lab)},
        2, {"bf16": True},
    ),
    "permuted": ("S2FTConfig", {"ratio": 0.25, "layout": "permuted"}, 3, {}),
    "half-0": ("SpielConfig", {"density": 0.1}, 0, {"bf16": True}),
    "optimizer": (
        "SpielConfig", {"density": 0.1}, 2,
        {"conf": {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}},
    ),
    "forced": (
        "SpielConfig", {"density": 0.1}, 2,
        {"conf": {"zero_force_ds_cpu_optimizer": True,
                  "zero": {"offload_optimizer": {"device": "cpu"}}}},
    ),
    "calibrated": (
        "SpielConfig", {"density": 0.1, "growth": "none", "selection": "gradient"}, 3, {},
    ),
    "pooled": (
        "S2FTConfig", {"density": 0.1, "selection": "activation", "allocation": "pooled"}, 2, {},
    ),
    "l1": ("SoRAConfig", {"l1": 0.1}, 3, {}),
    "nvme": (
        "S2FTConfig", {"density": 0.1}, 3,
        {"conf": {"zero": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}},
    ),
    "eight-bit": ("S2FTConfig", {"density": 0.1}, 2, {"optim": "adamw_bnb_8bit"}),
}  # fmt: skip


def refused(lab: Any) -> dict[str, str]:
    """Return what is said of settings that can't run."""
    found = {}
    for name, (method, settings, stage, training) in REFUSED.items():
        runs().cases.MODELS[name] = (runs().cases.peft(method, **settings), {})
        trainer = runs().build(lab, name, stage, f"refused-{name}", **training)
        try:
            trainer.train()
        except ValueError as error:
            found[name] = str(error)
    return found


SPECIAL = {
    "interrupted": interrupted,
    "from-plain": from_plain,
    "one-process": one_process,
    "best": best,
    "best-table": best_table,
    "half": half,
    "offloaded": offloaded,
    "native": native,
    "partitioned-base": partitioned_base,
    "refused": refused,
}
