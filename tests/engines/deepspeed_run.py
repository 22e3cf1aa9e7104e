"""Training runs under DeepSpeed on the CPU, in as many processes as torchrun starts.

torchrun --standalone --nproc_per_node 2 deepspeed_run.py FOLDER CASE...
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

HERE = Path(__file__).parent


def load(path: Path) -> Any:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


cases = load(HERE / "ddp_cases.py")
packed_cases = load(HERE / "packed_cases.py")
packed_cases.add_to(cases)
laboratory = load(HERE.parent / "sft" / "training" / "conftest.py")

# an optimizer that DeepSpeed makes
ADAM = ("lr", "betas", "eps", "weight_decay")
CONFIGURED = {"type": "AdamW", "params": {"torch_adam": True, **dict.fromkeys(ADAM, "auto")}}

# by name of a run: the model, the stage of ZeRO, and what else is set
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{f"{name}-2": (name, 2, {}) for name in
       ("spiel", "spiel-accumulated", "spiel-calibrated", "s2ft", "s2ft-gradient", "sora",
        "sltrain", "lora", "full")},
    **{f"{name}-3": (name, 3, {}) for name in ("spiel", "s2ft", "sora", "sltrain", "lora")},
    "spiel-0": ("spiel", 0, {}),
    "spiel-momentum-0": ("spiel-momentum", 0, {}),
    "spiel-1": ("spiel", 1, {}),
    "s2ft-configured-2": ("s2ft", 2, {"conf": {"optimizer": CONFIGURED}}),
    "s2ft-activation-3": ("s2ft-activation", 3, {}),
    "s2ft-experts-1": ("s2ft-experts", 1, {}),
}  # fmt: skip

# the rest of what runs, which takes longer than it tells
FURTHER: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{f"{name}-0": (name, 0, {}) for name in
       ("spiel-calibrated", "s2ft", "s2ft-activation", "s2ft-gradient", "s2ft-experts", "sora",
        "sltrain", "full", "lora")},
    **{f"sltrain-scale-{stage}": ("sltrain-scale", stage, {}) for stage in range(4)},
    **{f"sltrain-pretrain-{stage}": ("sltrain-pretrain", stage, {}) for stage in range(3)},
    **{f"packed-{name}-2": (f"packed-{name}", 2, {}) for name in
       ("spiel", "spiel-calibrated", "spiel-embedding", "s2ft", "s2ft-activation",
        "s2ft-gradient", "sora", "sltrain")},
    **{f"packed-{name}-3": (f"packed-{name}", 3, {}) for name in
       ("spiel", "spiel-embedding", "s2ft", "s2ft-activation", "sora", "sltrain")},
    "sharded-spiel-3": ("sharded-spiel", 3, {}),
    "int8-spiel-2": ("int8-spiel", 2, {}),
    "full-3": ("full", 3, {"conf": {"zero": {"stage3_gather_16bit_weights_on_model_save": True}}}),
}  # fmt: skip


def config(stage: int, **settings: Any) -> dict[str, Any]:
    """Return a DeepSpeed configuration."""
    zero: dict[str, Any] = {"stage": stage, **settings.pop("zero", {})}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # or parameters this small stay whole
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": zero,
        **dict.fromkeys(auto, "auto"),
        "bf16": {"enabled": "auto"},
        **settings,
    }


class DeepSpeedLab(laboratory.Lab):
    """A laboratory whose trainers run on DeepSpeed."""

    conf: ClassVar[dict[str, Any]] = {}

    def arguments(self, out: str, **settings: Any) -> Any:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # one trainer a process is what accelerate thinks of
        return super().arguments(out, **{"deepspeed": self.conf} | settings)


def build(lab: Any, name: str, stage: int, out: str, **settings: Any) -> Any:
    """Return the trainer of a case at a stage of ZeRO."""
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # an earlier run's, by which a base would be read in parts
    type(lab).conf = config(stage, **settings.pop("conf", {}))
    count = torch.distributed.get_world_size()
    return cases.build(name, lab, out, processes=count, **settings)


def told(trainer: Any) -> dict[str, Any]:
    """Return what a run leaves in its log."""
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "replaced": dict(trainer.sparse_callback.replaced),
        "processes": trainer.args.world_size,
        "stepped": [tuple(t.shape) for g in trainer.optimizer.param_groups for t in g["params"]],
    }


def run(lab: Any, name: str) -> dict[str, Any]:
    """Train a case and leave what it trained in a folder of its name."""
    model, stage, settings = (RUNS | FURTHER)[name]
    trainer = build(lab, model, stage, name, **settings)
    trainer.train()
    trainer.save_model(str(lab.folder / name / "saved"))
    return told(trainer)


def main() -> None:
    import deepspeed
    import torch

    # or DeepSpeed compiles, for half a minute and more, what inference alone reads
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    lab, found = DeepSpeedLab(folder), {}
    for name in names:
        found[name] = SPECIAL.get(name, lambda lab, name=name: run(lab, name))(lab)
        torch.distributed.barrier()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # nobody leaves while another still speaks
    torch.distributed.destroy_process_group()


SPECIAL: dict[str, Any] = load(HERE / "deepspeed_special.py").SPECIAL

if __name__ == "__main__":
    main()
